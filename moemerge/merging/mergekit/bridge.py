"""mergekit's merge methods of ours, and mergekit's own commands with these methods registered.

`routing_normalized_average`: the base model is the shared expert, and gives everything that is not merged;
each other model has the parameter `expert`, its number among the routed experts (or among the models that
were given to fit); the parameter `coefficients` is a folder that `moemerge fit` wrote, or its file.
`routing_normalized_average_inline`: the same average with its weights in the YAML, `weight` per model (sum
one in each layer) and `shared_weight` for the base. A method of its own, because mergekit ignores parameters
that a method does not have: with every parameter required, a misspelt one is an error.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    OptionalTensorPolicy,
    PerNonBase,
    TensorGroup,
)
from mergekit.merge_methods.easy_define import merge_method
from pydantic import AfterValidator, Field

from moemerge.errors import CheckpointError, OptionError, UnsupportedError
from moemerge.merging.average import routing_normalized_average
from moemerge.merging.blocks import blocks_of, layer_of
from moemerge.merging.coefficients import FILE, Coefficients
from moemerge.merging.mergekit.guards import guarded, our_documents, refuse_separators, whole
from moemerge.models.finite import finite
from moemerge.options.base import OURS

INLINE = f"{OURS}_inline"
# The stock commands, and the argument of each that is the YAML file.
COMMANDS = {
    "yaml": ("mergekit.scripts.run_yaml", "config_file"),
    "multi": ("mergekit.scripts.multimerge", "config_file"),
    "pytorch": ("mergekit.scripts.merge_raw_pytorch", "config_path"),
}
_yaml_folders: list[Path] = []


def _existing(source: str) -> str:
    """The absolute path of a coefficients file; mergekit asks for it while it plans, before it writes."""
    candidates = [folder / source for folder in _yaml_folders] + [Path(source)]
    path = next((path for path in candidates if path.exists()), Path(source)).absolute()
    _load(str(path))
    return str(path)


CoefficientsPath = Annotated[str, AfterValidator(_existing)]
_SHAPE = {
    "reference_url": "https://arxiv.org/abs/2512.00724",
    "contract": InputContract(base=BasePolicy.REQUIRED, min_inputs=2, min_non_base=1),
    "optional_tensor_policy": OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
}


@merge_method(name=OURS, pretty_name="Routing-normalised average", **_SHAPE)  # type: ignore[untyped-decorator]
def average(
    group: TensorGroup, expert: PerNonBase[Annotated[int, Field(ge=0)]], coefficients: CoefficientsPath
) -> torch.Tensor:
    """The average of one tensor by its block's coefficients; what these do not merge is the base model's.

    Raises OptionError unless the models are numbered 0 ... N-1, each once (a base without a shared weight has
    the number that is missing), and CheckpointError for coefficients that cannot be read, have more layers
    than the model, or lack a block in which models differ.
    """
    _check_finite(group)
    fitted = _load(coefficients)
    _refuse_scales(fitted, coefficients)
    assert group.base is not None
    members = _in_order(fitted, group, expert.values_for(group.non_base))
    blocks = _blocks(fitted, group.metadata.name or "")
    if not blocks:
        return group.base.tensor
    _check_layers(fitted, group.base.id, coefficients)
    row = next((fitted.blocks.index(block) for block in blocks if block in fitted.blocks), None)
    if row is None:
        return _common(group, coefficients)
    return routing_normalized_average(
        group.base.tensor, members, fitted.alpha_LN[row], float(fitted.shared_L[row]), fitted.coordinates
    )


@merge_method(name=INLINE, pretty_name="Routing-normalised average (inline weights)", **_SHAPE)  # type: ignore[untyped-decorator]
def average_inline(
    group: TensorGroup,
    weight: PerNonBase[Annotated[float, Field(ge=0)]],
    shared_weight: Annotated[float, Field(ge=0, le=1)],
) -> torch.Tensor:
    """The average of one MLP tensor by weights from the YAML; any other tensor is the base model's.

    Raises OptionError unless the weights of the models besides the base sum to one.
    """
    assert group.base is not None
    _check_finite(group)
    if mlp_layer(group.metadata.name or "") is None:
        return group.base.tensor
    tensors = [entry.tensor for entry in group.non_base]
    return routing_normalized_average(
        group.base.tensor, tensors, weight.values_for(group.non_base), shared_weight
    )


def register() -> None:
    """Make the methods known to mergekit by their names; once is enough, twice does no harm."""
    known = [method.spec.name for method in registry.registered_methods()]
    for method in (average, average_inline):
        if method.spec.name not in known:
            registry.register(method)


def run_command(name: str, arguments: Sequence[str], program: str) -> None:
    """Run mergekit's own command `name` (yaml, multi, pytorch) with our methods registered.

    `arguments` are the stock command's. A relative path in the parameter `coefficients` starts at the YAML's
    folder if it exists there, else at the working directory. Raises what the command raises.
    """
    register()
    module, config = importlib.import_module(COMMANDS[name][0]), COMMANDS[name][1]
    command: Any = module.main
    with command.make_context(program, list(arguments)) as context:
        file = Path(context.params[config])
        with _fresh_loaders(), _relative_to(file), _checked(name, module, file, context.params):
            command.invoke(context)


@contextmanager
def _checked(name: str, module: Any, file: Path, parameters: dict[str, Any]) -> Iterator[None]:
    """Checks before and after each merge of the YAML `file` that is by a method of ours."""
    documents = our_documents(file, (OURS, INLINE))
    if not documents:
        yield
    elif name == "pytorch":  # bare files of weights: there is no model to check
        with whole(Path(parameters["out_path"])) as draft:
            parameters["out_path"] = str(draft)
            yield
    else:
        refuse_separators(documents, dicts_too=name == "multi")
        stock, module.run_merge = module.run_merge, guarded(module.run_merge, (OURS, INLINE))
        try:
            yield
        finally:
            module.run_merge = stock


@contextmanager
def _relative_to(yaml: Path) -> Iterator[None]:
    _yaml_folders.append(yaml.absolute().parent)
    try:
        yield
    finally:
        _yaml_folders.pop()


@contextmanager
def _fresh_loaders() -> Iterator[None]:
    """mergekit keeps opened models for the life of the process, also those replaced on disk since."""
    from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache

    caches: list[Any] = [LoaderCache.loaders, SimpleLoaderCache().loaders]
    for opened in caches:
        opened.clear()
    try:
        yield
    finally:
        for opened in caches:
            opened.clear()


def mlp_layer(name: str) -> int | None:
    """The layer whose MLP holds the tensor `name` of a dense checkpoint; None if it is no MLP's."""
    match = _mlp_pattern().search(name)
    return int(match.group(1)) if match else None


@cache
def _mlp_pattern() -> re.Pattern[str]:
    """Names of MLP tensors in the families that moemerge knows."""
    from moemerge.models.families import FAMILIES

    families = FAMILIES.values()
    layers = {family.layers.rpartition(".")[2] for family in families}
    matrices = {path for family in families for _, path in family.matrices}
    either = [f"(?:{'|'.join(map(re.escape, sorted(names)))})" for names in (layers, matrices)]
    return re.compile(rf"(?:^|\.){either[0]}\.(\d+)\.{either[1]}\.(?:weight|bias)$")


def _load(source: str) -> Coefficients:
    path = Path(source)
    file = path / FILE if path.is_dir() else path
    # mergekit asks once per tensor: the file is read once, and again only if it has changed.
    try:
        return _load_version(str(file), file.stat().st_mtime_ns)
    except OSError as error:
        raise CheckpointError(
            "coefficients cannot be read",
            given=f"{source} ({error.strerror})",
            expected="a folder that `moemerge fit` wrote, or its file",
            fix="correct the parameter coefficients; relative paths start at the working directory, "
            "and under `moemerge mergekit` at the YAML's folder first",
        ) from error


@lru_cache(maxsize=8)
def _load_version(file: str, mtime_ns: int) -> Coefficients:
    return Coefficients.load(file)


def _check_finite(group: TensorGroup) -> None:
    for entry in ([group.base] if group.base else []) + list(group.non_base):
        finite(entry.tensor, f"{group.metadata.name} of {entry.id}")


def _in_order(fitted: Coefficients, group: TensorGroup, numbers: list[int]) -> list[torch.Tensor]:
    """The members' tensors by number. The base is one of them if it has no weight of its own."""
    assert group.base is not None
    by_number = dict(zip(numbers, (entry.tensor for entry in group.non_base), strict=True))
    missing = set(range(fitted.num_experts)) - by_number.keys()
    # Without a shared weight the base would count for nothing: it is then the member whose number nobody has.
    if len(missing) == 1 and not bool(fitted.shared_L.any()):
        by_number[missing.pop()] = group.base.tensor
        numbers = [*by_number]
    if sorted(numbers) != list(range(fitted.num_experts)):
        last = fitted.num_experts - 1
        raise OptionError(
            "models and coefficients do not match",
            given=f"models with expert: {', '.join(map(str, numbers))}",
            expected=f"{last + 1} models besides the base, with expert: 0 to {last}, each once",
            fix="correct the parameter expert of each model, or give the coefficients of this merge",
        )
    return [by_number[number] for number in range(fitted.num_experts)]


def _blocks(fitted: Coefficients, name: str) -> tuple[str, ...]:
    """The blocks that the tensor `name` may belong to; none if these coefficients do not merge its kind."""
    scope, in_head = fitted.meta.get("scope", "mlp"), name in fitted.meta.get("head", "").split(",")
    if scope == "mlp" and mlp_layer(name) is None:
        return ()
    return () if in_head and scope != "all" else blocks_of(name, in_head)


def _refuse_scales(fitted: Coefficients, source: str) -> None:
    if fitted.scales is not None:
        raise UnsupportedError(
            "these coefficients divide the models' heads first, which this method does not do",
            given=f"{source}: heads divided by {', '.join(f'{scale:.4g}' for scale in fitted.scales)}",
            expected="coefficients that were fitted without calibration",
            fix="merge by moemerge merge --models, or write scaled models with moemerge export",
        )


def _check_layers(fitted: Coefficients, base: Any, source: str) -> None:
    """Compare with the base model's number of layers, where mergekit tells which model it is."""
    count = _layer_count(base) if hasattr(base, "config") else None
    last = max((layer_of(block) or 0 for block in fitted.blocks), default=0)
    if count is not None and last >= count:
        raise CheckpointError(
            "coefficients do not belong to these models",
            given=f"{source}: layers up to {last}",
            expected=f"layers 0 to {count - 1} of {base}",
            fix="give the coefficients of this merge",
        )


@lru_cache(maxsize=8)
def _layer_count(base: Any) -> int | None:
    try:
        count = base.config(trust_remote_code=False).num_hidden_layers
    except (OSError, ValueError, AttributeError):  # mergekit-pytorch names bare files of weights
        return None
    return int(count)


def _common(group: TensorGroup, source: str) -> torch.Tensor:
    """The tensor that all models share, in a block without coefficients."""
    assert group.base is not None
    if all(torch.equal(entry.tensor, group.base.tensor) for entry in group.non_base):
        return group.base.tensor
    raise CheckpointError(
        "a block has no coefficients, but its models differ",
        given=f"{group.metadata.name}; {source}",
        expected="coefficients for every block in which the models differ",
        fix="fit coefficients for these models, or merge the models that they were fitted for",
    )


register()
