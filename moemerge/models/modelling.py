"""Reward models of our own as transformers classes: made from the dense ones, saved and loaded as HF folders.

For each family there is a config class (model_type moemerge_FAMILY, the dense config plus the fields
`moemerge` and `moemerge_head`) and model classes that put MoE layers where the dense MLPs stood, if the first
field is set, and another head where the dense model's stood, if the second is. No modelling file is copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import new_class
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)

from moemerge.errors import UnsupportedError
from moemerge.models.families import ADDED, FAMILIES, family_of
from moemerge.models.families.base import PREFIX, Family
from moemerge.models.families.dense import dense_class, dense_config, describes_model, is_moe, skeleton
from moemerge.models.folder import ModelFolder, opened
from moemerge.models.head_tensors import output_layer
from moemerge.models.heads.base import head_of
from moemerge.models.heads.install import install_head, refuse_heads_by_expert
from moemerge.models.heads.saved import FIELD, head_field
from moemerge.models.layout import Layout, write_layout
from moemerge.models.loading import check_loading, load_weights, quiet_loading
from moemerge.models.moe import HeadByExpert, MoELayer, StackedExperts, TokenContext, moe_layers
from moemerge.models.moe_settings import BY_EXPERT, MoeSettings
from moemerge.models.pooling import named_pad, pooled_positions
from moemerge.models.shim import install_shim

__all__ = ["dense_class", "dense_config", "install_shim", "load_moe", "moe_config", "register"]


OWN_FIELDS = ("moemerge", FIELD)


class MoemergeConfigMixin:
    """What every config of ours adds to the dense one."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        _register_models(self.model_type.removeprefix(PREFIX))  # type: ignore[attr-defined]

    def to_dict(self) -> dict[str, Any]:
        """As the dense config, without what is not there: experts, or a head of ours."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {key: value for key, value in values.items() if not (key in OWN_FIELDS and value is None)}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: the shim in the checkpoint is the only remote code there is."""


class MoemergeModelMixin:
    """What every model of ours adds to the dense one."""

    def __init__(self, config: PretrainedConfig) -> None:
        kernel = config._experts_implementation
        config._experts_implementation = None  # the dense class, which builds first, would refuse it
        super().__init__(config)  # type: ignore[call-arg]
        config._experts_implementation = kernel or "grouped_mm"
        if is_moe(config):
            install_experts(cast(PreTrainedModel, self))

    def get_correct_experts_implementation(self, requested: str | None) -> str | None:
        """As the dense class, but undecided stays so: a dense module inside would refuse a kernel."""
        if requested is None:
            return None
        return cast(str, super().get_correct_experts_implementation(requested))  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: the shim in the checkpoint is the only remote code there is."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, StackedExperts):
            for name, weight in module.named_parameters():
                std = 0.0 if name.endswith("_bias") else getattr(module.config, "initializer_range", 0.02)
                init.normal_(weight, mean=0.0, std=std)


class MoemergeRewardMixin(MoemergeModelMixin):
    """A model with a reward head, or one for each expert: learns which tokens count, and saves its shim."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        if is_moe(config) and MoeSettings.read(config.moemerge).heads == BY_EXPERT:
            install_heads(cast(PreTrainedModel, self))
        if head_field(config) is not None:
            install_head(cast(PreTrainedModel, self))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        prompt_lengths: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the dense class, and `prompt_lengths` [B], tokens of the prompt, for the gate `prompt`."""
        model = cast(PreTrainedModel, self)
        if is_moe(model.config):
            _mark_tokens(model, input_ids, attention_mask, prompt_lengths)
        with _scores_read_at(model, input_ids):
            # By keyword: a few dense classes have another argument between the two.
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As the dense class; adds the shim, which says what to install, and the layout."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        config = cast(PreTrainedModel, self).config
        install_shim(save_directory)
        if is_moe(config):
            write_layout(save_directory, layout_of(config))


@cache
def config_class(family: str) -> type[PretrainedConfig]:
    """Our config class of a family: the dense one's subclass."""
    dense = CONFIG_MAPPING[family]
    body = {
        "model_type": PREFIX + family,
        "__annotations__": {"moemerge": dict | None, FIELD: dict | None},
        "moemerge": None,
        FIELD: None,
        # The dense plans name MLPs that are not there.
        "base_model_tp_plan": None,
        "base_model_ep_plan": None,
        "__module__": __name__,
    }
    name = f"Moemerge{dense.__name__}"
    return cast(type[PretrainedConfig], new_class(name, (MoemergeConfigMixin, dense), exec_body=_with(body)))


@cache
def model_class(family: str) -> type[PreTrainedModel]:
    """Our reward model class of a family."""
    return _subclass(MoemergeRewardMixin, dense_class(CONFIG_MAPPING[family]()), family)


@cache
def _backbone_class(family: str) -> type[PreTrainedModel]:
    dense = cast(type[PreTrainedModel], MODEL_MAPPING[CONFIG_MAPPING[family]])
    return _subclass(MoemergeModelMixin, dense, family)


def _subclass(mixin: type, dense: type[PreTrainedModel], family: str) -> type[PreTrainedModel]:
    body = {"config_class": config_class(family), "__module__": __name__}
    return cast(
        type[PreTrainedModel], new_class(f"Moemerge{dense.__name__}", (mixin, dense), exec_body=_with(body))
    )


def _with(body: dict[str, Any]) -> Any:
    return lambda namespace: namespace.update(body)


def register() -> None:
    """Make AutoConfig know every family's class; the model classes follow with the first such config."""
    for family in _model_types():
        AutoConfig.register(PREFIX + family, config_class(family), exist_ok=True)


def _model_types() -> list[str]:
    """Of all families that transformers has; those of other packages are not imported for this."""
    return [*FAMILIES, *(name for name in ADDED if name in CONFIG_MAPPING)]


@cache
def _register_models(family: str) -> None:
    kind = config_class(family)
    AutoModelForSequenceClassification.register(kind, model_class(family), exist_ok=True)
    AutoModel.register(kind, _backbone_class(family), exist_ok=True)


def moe_config(dense: PretrainedConfig, settings: MoeSettings) -> PretrainedConfig:
    """The config of the MoE made from `dense`: every dense value is kept, and its head.

    UnsupportedError for a prompt gate on an encoder, and for a head of ours where each expert is to have one.
    """
    family = family_of(dense)
    if settings.gate == "prompt" and not family.causal:
        raise UnsupportedError(
            "gate prompt cannot work on an encoder",
            given=f"{dense.model_type}, whose prompt states see the answer",
            expected="a causal model",
            fix="choose gate xft or topk",
        )
    values = dense.to_dict()
    for name in ("model_type", "architectures", "auto_map"):
        values.pop(name, None)
    config = config_class(family.model_type)(**{**values, "moemerge": settings.to_dict()})
    config.architectures = [model_class(family.model_type).__name__]
    if head_field(config) is not None:
        refuse_heads_by_expert(config)
    return config


def layout_of(config: PretrainedConfig) -> Layout:
    """The layout that follows from a MoE's config; builds both models without weights.

    CheckpointError for a config that describes no model.
    """
    family = family_of(config)
    with describes_model(config.model_type):
        with torch.device("meta"):
            model = model_class(family.model_type)(config)
        return Layout(
            class_name=type(model).__name__,
            moe={name: tuple(value.shape) for name, value in model.state_dict().items()},
            tied=list(getattr(model, "all_tied_weights_keys", None) or {}),
            dense=list(skeleton(config).state_dict()),
            experts=family.expert_tensors(config),
            dense_config=json.loads(dense_config(config).to_json_string()),
        )


def install_experts(model: PreTrainedModel) -> None:
    """Put fresh MoE layers where `model.config.moemerge` says; layers that have one are left alone."""
    config, context = model.config, TokenContext()
    settings, family = MoeSettings.read(config.moemerge), family_of(config)
    for number in settings.layers:
        layer = model.base_model.get_submodule(family.layers)[number]  # type: ignore[index]
        if not isinstance(layer.get_submodule(family.block), MoELayer):
            _install(layer, family, settings, model)
    for moe in moe_layers(model).values():
        moe.context, moe.balance_scale = context, 1 / len(settings.layers)


def install_heads(model: PreTrainedModel) -> None:
    """Put a fresh head for each expert where the one head was."""
    layer = next(iter(moe_layers(model).values()))
    name = output_layer(model)
    dense = cast(torch.nn.Linear, model.get_submodule(name))
    heads = HeadByExpert(dense, layer.settings.num_routed_experts, layer.context)
    model.set_submodule(name, heads)
    model._init_weights(heads)


def _install(layer: torch.nn.Module, family: Family, settings: MoeSettings, model: PreTrainedModel) -> None:
    config = model.config
    shapes: dict[str, tuple[int, ...]] = {}
    for t in family.layer_tensors(layer, "", 0):
        stack = t.stacked.rsplit(".", 1)[1]
        rows = shapes.get(stack, (0, 0))[1] + t.stored_shape[0]
        shapes[stack] = (settings.num_routed_experts, rows, *t.stored_shape[1:])
    shared = family.dense_expert(layer, config) if settings.shared_expert else None
    experts = StackedExperts(config, shapes, family.activation_of(config))
    moe = MoELayer(settings, config.hidden_size, experts, shared, family.dropout_of(config))
    for path in family.bypass:
        layer.set_submodule(path, torch.nn.Identity())
    layer.set_submodule(family.block, moe)
    for module in (moe.experts, *moe.gate.modules()):
        model._init_weights(module)


@contextmanager
def _scores_read_at(model: PreTrainedModel, input_ids: torch.Tensor | None) -> Iterator[None]:
    """While open, a head of ours computes scores where the class reads them, and nowhere else."""
    head, pad = head_of(model), named_pad(model.config)
    if head is not None and input_ids is not None and pad is not None:
        head.positions_B = pooled_positions(input_ids, pad)
    try:
        yield
    finally:
        if head is not None:
            head.positions_B = None


def _mark_tokens(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    prompt_lengths: torch.Tensor | None,
) -> None:
    """Put into the context that all MoE layers share which tokens are real, and which are the prompt's."""
    context = next(iter(moe_layers(model).values())).context
    context.mask_BT = context.prompt_BT = None
    if attention_mask is not None and attention_mask.dim() == 2:
        length = attention_mask.shape[1] if input_ids is None else input_ids.shape[1]
        context.mask_BT = attention_mask[:, -length:].bool()  # with a cache, the mask has earlier tokens too
    if prompt_lengths is not None:
        mask_BT = context.mask_BT
        if mask_BT is None:
            assert input_ids is not None
            mask_BT = torch.ones_like(input_ids, dtype=torch.bool)
        # The first real token is number 1, wherever padding stands.
        number_BT = mask_BT.long().cumsum(1)
        context.prompt_BT = mask_BT & (number_BT <= prompt_lengths.to(number_BT.device)[:, None])


def write_moe_config(folder: Path, config: PretrainedConfig, layout: Layout) -> None:
    """Write what lies beside a MoE's weights: its config, the shim, and the layout that follows from it."""
    config.save_pretrained(folder)
    install_shim(folder)
    write_layout(folder, layout)


def load_moe(
    folder: ModelFolder | str | Path, device: str = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The MoE reward model in `folder`, in eval mode; `dtype` defaults to the checkpoint's.

    Raises CheckpointError if it is not a moemerge MoE, or a tensor is missing, left over or misshapen.
    """
    moe = opened(folder)
    moe.require_moe()
    moe.weights  # noqa: B018 (raises for damaged ones)
    model, loading = load_weights(moe, deepcopy(moe.config), dtype or "auto", device_map=device)
    check_loading(moe, model, loading)
    return model.eval()


def moe_to_look_at(folder: ModelFolder | str | Path, device: str = "cpu") -> PreTrainedModel:
    """As load_moe, to be run and not changed: on a CPU its weights stay in its files, and take no memory.

    Whoever writes to them ends the process.
    """
    moe = opened(folder)
    moe.require_moe()
    mapped = _mapped(moe) if device == "cpu" else None
    return load_moe(moe, device) if mapped is None else mapped.eval()


def _mapped(moe: ModelFolder) -> PreTrainedModel | None:
    """The MoE on the tensors of its files where they lie; None unless these are just what it is made of."""
    from accelerate import init_empty_weights

    with init_empty_weights(), quiet_loading():
        model = AutoModelForSequenceClassification.from_config(deepcopy(moe.config), dtype=moe.config.dtype)
    names, wanted = moe.weights.names, model.state_dict()
    forms = {name: (moe.weights.shape(name), moe.weights.dtype(name)) for name in names}
    if forms != {name: (tuple(weight.shape), weight.dtype) for name, weight in wanted.items()}:
        return None
    model.load_state_dict({name: moe.weights.mapped(name) for name in names}, assign=True)
    return cast("PreTrainedModel", model)


def __getattr__(name: str) -> Any:
    """The generated classes by name, so that they can be pickled and imported."""
    models = (
        (model_class, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (_backbone_class, MODEL_MAPPING_NAMES),
    )
    for family in _model_types() if name.startswith("Moemerge") else ():
        if name == config_class(family).__name__:
            return config_class(family)
        for make, names in models:
            if name == f"Moemerge{names[family]}":
                return make(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
