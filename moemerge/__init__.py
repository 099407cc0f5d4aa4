"""Upcycle a reward model into a mixture of experts, train it, and merge it back with learned coefficients.

Importing this package loads nothing heavy. What it offers is imported when first used, and its model
types and merge method are made known to transformers and mergekit when those are imported.
What type checkers and editors see of it is __init__.pyi, which is made from the options.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

_HOMES = {
    "strength": "stages.strength",
    "upcycle": "stages.upcycle",
    "train": "stages.train",
    "route": "stages.route",
    "calibrate": "stages.calibrate",
    "changes": "stages.changes",
    "fit": "stages.fit",
    "gate": "stages.gate",
    "merge": "stages.merge",
    "fit_models": "stages.fit",
    "merge_models": "stages.merge",
    "export": "stages.export",
    "sample": "stages.sample",
    "optimise": "stages.optimise",
    "evaluate": "stages.evaluate",
    "few_shot": "stages.few_shot",
    "explain": "stages.explain",
    "choose": "stages.choose",
    "attack": "stages.attack",
    "robustness": "stages.robustness",
    "publish": "stages.publish",
    "compare": "stages.compare",
    "prepare": "stages.data",
    "write_world": "stages.synthetic",
    "run_recipe": "run.pipeline",
    "audit": "run.audit",
    "combine": "run.combine",
    "patch": "run.patch",
    "check_recipe": "run.check",
    "load_recipe": "run.check",
    "forecast": "run.forecast",
    "load_moe": "models.modelling",
    "open_result": "run.steps",
    "Result": "artifacts.result",
    "RunReport": "run.steps",
    "StepReport": "run.steps",
    "token_rewards": "evaluation.token_rewards",
    "TokenRewards": "evaluation.token_rewards",
    "verify": "artifacts.verify",
    "verify_folder": "artifacts.verify",
    "RoutingStatistics": "models.routing",
    "Coefficients": "merging.coefficients",
    "MoemergeError": "errors",
    "OptionError": "errors",
    "DataError": "errors",
    "CheckpointError": "errors",
    "UnsupportedError": "errors",
    "ArtifactError": "errors",
    "Faults": "errors",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """The public name `name`, imported from its home when first asked for (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("moemerge")
    if name == "modelling":  # MoE folders on disk and on the hub hold `from moemerge import modelling`
        return importlib.import_module("moemerge.models.modelling")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if "IPython" in sys.modules and importlib.import_module("moemerge.artifacts.progress").in_notebook():
        importlib.import_module("moemerge.run.messages").tell_in_notebook()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _HostWatch:
    """An import finder that finds nothing: it notices when transformers or mergekit is first imported."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in _HOSTS and cls in sys.meta_path:
            sys.meta_path.remove(cls)
            _hook_hosts()
        return None


_HOSTS = ("transformers", "mergekit")
_PREFIX = "moemerge_"  # models.families.base.PREFIX, which a light import cannot read


def _hook_hosts() -> None:
    import wrapt  # costs more than the rest of this file, so it waits for a host

    wrapt.register_post_import_hook(_watch_model_types, "transformers.models.auto.configuration_auto")
    wrapt.register_post_import_hook(_register_method, "mergekit.merge_methods.registry")


def _watch_model_types(module: Any) -> None:
    """Have the first look-up of a model type of ours register the classes for it.

    Importing them here would be too early: transformers is often half imported when this hook runs.
    """
    import wrapt

    def look_up(wrapped: Any, instance: Any, args: tuple[str], kwargs: dict[str, Any]) -> Any:
        if str(args[0]).startswith(_PREFIX):
            _register_model_types()
        return wrapped(*args, **kwargs)

    for method in ("__getitem__", "__contains__"):
        wrapt.wrap_function_wrapper(type(module.CONFIG_MAPPING), method, look_up)


@cache
def _register_model_types() -> None:
    importlib.import_module("moemerge.models.modelling").register()


def _register_method(registry: ModuleType) -> None:
    importlib.import_module("moemerge.merging.mergekit.bridge")  # registers, once it is imported whole


if any(host in sys.modules for host in _HOSTS):
    _hook_hosts()
else:
    sys.meta_path.insert(0, _HostWatch)
