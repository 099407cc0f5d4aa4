"""Stage upcycle: a dense reward model becomes a mixture of experts that computes the same function.

Every expert starts as a copy of the dense MLP (sparse upcycling, arXiv 2212.05055), or as the MLP of another
model (Branch-Train-MiX, arXiv 2403.07816), and gate weights sum to one (XFT, arXiv 2404.15247). Letters: N
routed experts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy

import torch
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from moemerge.artifacts.progress import hidden
from moemerge.artifacts.stage import Draft, stage
from moemerge.errors import UnsupportedError
from moemerge.merging.calibration import Calibration
from moemerge.merging.sources.models import ModelList, ModelTensor
from moemerge.models.checkpoint import copy_side_files, write_checkpoint
from moemerge.models.device import use_device
from moemerge.models.equivalence import largest_difference, probe_scores, probe_texts, require_alike
from moemerge.models.families import family_of
from moemerge.models.families.base import ExpertTensor
from moemerge.models.families.dense import skeleton
from moemerge.models.finite import finite
from moemerge.models.folder import ModelFolder
from moemerge.models.head_tensors import output_names, warn_of_fresh_head
from moemerge.models.heads.saved import head_result
from moemerge.models.loading import load_reward_model
from moemerge.models.modelling import layout_of, moe_config, moe_to_look_at, write_moe_config
from moemerge.models.moe import make_router
from moemerge.models.moe_settings import BY_EXPERT, MoeSettings
from moemerge.models.pooling import name_pad_of_fresh_head
from moemerge.options.layers import parse_layers
from moemerge.options.upcycle import Upcycle

log = logging.getLogger(__name__)


@stage("upcycle", Upcycle)
def upcycle(options: Upcycle, draft: Draft) -> None:
    """Write the MoE of `options.model`, and check on a probe batch that it equals the dense model.

    A base language model or encoder, or with `fresh_head` any model that lacks its head, gets a fresh one
    drawn from `seed`. With `experts` the routed experts are these models' MLPs, and nothing is compared: the
    function is another one. Weights are read and written tensor by tensor, so no more than one shard is held.
    Raises UnsupportedError for an unknown architecture and CheckpointError for a damaged model or when the
    functions differ; UnsupportedError for experts of another architecture than the model's.
    """
    device = use_device(options)
    source = ModelFolder(options.model, options.trust_remote_code, options.fresh_head)
    config = _dense_config(source)
    settings = _settings(options, config)
    moe = moe_config(config, settings)
    if source.missing_head or options.fresh_head:
        warn_of_fresh_head(source.source, tuple(source.missing_head))
    layout = layout_of(moe)
    draft.reserve(sum(map(math.prod, layout.moe.values())) * _dtype(source).itemsize)
    write_checkpoint(draft.folder, _moe_tensors(source, moe, options), options.shard_size)
    write_moe_config(draft.folder, moe, layout)
    copy_side_files(source.folder, draft.folder)
    draft.results.update(settings.to_dict(), fresh_head=source.missing_head)
    draft.results |= head_result(draft.folder)
    if not options.experts:
        _compare(options, source, draft, device)


def _dense_config(source: ModelFolder) -> PretrainedConfig:
    """The reward model's config: of a base model too, whose head has one output then."""
    source.require_dense()
    config = deepcopy(source.config)
    family_of(config)
    if not source.missing_head and source.claims_head:
        source.require_one_output()
    config.num_labels = 1
    config.dtype = _dtype(source)
    if source.missing_head:
        name_pad_of_fresh_head(config, source)
    return config


def _dtype(source: ModelFolder) -> torch.dtype:
    """dtype of the first tensor that is the reward model's: before it there may be an old buffer."""
    own = set(source.dense_names.values())
    return source.weights.dtype(next(name for name in source.weights.names if name in own))


def _settings(options: Upcycle, config: PretrainedConfig) -> MoeSettings:
    return MoeSettings(
        num_routed_experts=options.num_routed_experts,
        num_experts_per_tok=options.num_experts_per_tok,
        shared_expert=options.shared_expert,
        layers=parse_layers(options.layers, config.num_hidden_layers),
        gate=options.gate,
        gate_shared_weight=options.gate_shared_weight,
        router=options.router,
        router_init_std=options.router_init_std,
        balance_coefficient=options.balance_coefficient,
        balance_loss=options.balance_loss,
        dense_dtype=str(config.dtype).removeprefix("torch."),
        heads=options.heads,
    )


def _moe_tensors(
    source: ModelFolder, moe: PretrainedConfig, options: Upcycle
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the MoE: what stays dense, then the experts stack by stack, then the routers."""
    # One generator for all draws, so the order in which tensors are made is part of what a seed means.
    generator = torch.Generator().manual_seed(options.seed)
    settings = MoeSettings.read(moe.moemerge)
    tensors = family_of(moe).expert_tensors(moe)
    experts = {t.dense for t in tensors}
    others, dense = _others(options), skeleton(moe)
    shapes, outputs = dense.state_dict(), output_names(dense)
    for name, held in tqdm(source.dense_names.items(), desc="backbone", disable=hidden()):
        if name in outputs and settings.heads == BY_EXPERT:
            yield name, _heads(others, ModelTensor(name, tuple(shapes[name].shape))).to(moe.dtype)
        elif held is None:
            yield name, _fresh(tuple(shapes[name].shape), name, moe, generator)
        elif name not in experts:
            yield name, _finite(source, held)
    for stack in tqdm(_stacks(tensors), desc="experts", disable=hidden()):
        yield from _expert_copies(source, others, stack, settings, options.expert_noise, generator)
    for prefix in dict.fromkeys(t.home for t in tensors):
        yield from _routers(prefix, moe, settings, options.router_init, generator)


def _fresh(
    shape: tuple[int, ...], name: str, config: PretrainedConfig, generator: torch.Generator
) -> torch.Tensor:
    """A tensor of a head that the model lacks, drawn as transformers draws it: biases are 0."""
    std = 0.0 if name.endswith("bias") else getattr(config, "initializer_range", 0.02)
    return (torch.randn(shape, generator=generator) * std).to(config.dtype)


def _finite(source: ModelFolder, held: str) -> torch.Tensor:
    """The tensor that the model calls `held`. Raises CheckpointError if it is not finite."""
    return finite(source.weights.tensor(held), f"{held} of {source.source}")


def _stacks(tensors: list[ExpertTensor]) -> list[list[ExpertTensor]]:
    """The tensors that lie in one stack together, as gate and up do."""
    stacks: dict[str, list[ExpertTensor]] = {}
    for tensor in tensors:
        stacks.setdefault(tensor.stacked, []).append(tensor)
    return list(stacks.values())


def _others(options: Upcycle) -> ModelList | None:
    """The models whose MLPs become the routed experts, beside the model itself; None for copies."""
    if not options.experts:
        return None
    models = [*options.experts.values()]
    scales = Calibration.load(options.calibration).scales_of(models) if options.calibration else None
    others = ModelList(models, base=options.model, scope="mlp", scales=scales)
    for model in others.models if options.heads == BY_EXPERT else []:
        if model.lacks:
            raise UnsupportedError(
                f"{model.folder} has no reward head to give its expert",
                given=f"heads {BY_EXPERT}",
                expected="reward models only",
                fix="leave heads as it is: shared, which is the model's own",
            )
    return others


def _heads(others: ModelList | None, tensor: ModelTensor) -> torch.Tensor:
    """The head of every expert, one below the other."""
    assert others is not None  # the options say so
    members = range(1, 1 + others.num_members)
    whose = [f"{tensor.dense} of {others.found_in(member)}" for member in members]
    return torch.cat([finite(others.matrix(tensor, n), what) for n, what in zip(members, whose, strict=True)])


def _expert_copies(
    source: ModelFolder,
    others: ModelList | None,
    stack: list[ExpertTensor],
    settings: MoeSettings,
    noise: float,
    generator: torch.Generator,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The shared copies of the tensors of one stack, then the stack."""
    dense = {t.dense: _finite(source, str(source.dense_names[t.dense])) for t in stack}
    if settings.shared_expert:
        yield from ((t.shared, dense[t.dense]) for t in stack)
    if others is None:
        expert = _joined(stack, dense)
        copies = expert.unsqueeze(0).repeat(settings.num_routed_experts, *[1] * expert.dim())
    else:
        copies = torch.stack([_joined(stack, mlp) for mlp in _mlps(others, stack, dense)])
    if noise:
        # Relative to each matrix's own standard deviation: those of one stack may differ in scale.
        for t in stack:
            part = copies[:, t.rows]
            std = noise * dense[t.dense].float().std()
            copies[:, t.rows] = (part + std * torch.randn(part.shape, generator=generator)).to(part.dtype)
    yield stack[0].stacked, copies


def _joined(stack: Sequence[ExpertTensor], mlp: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One expert's tensors of a stack, as they lie in it."""
    return torch.cat([mlp[t.dense].T if t.transposed else mlp[t.dense] for t in stack])


def _mlps(
    others: ModelList, stack: Sequence[ExpertTensor], dense: Mapping[str, torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of one stack by name, of each of the other models, in the dtype of the model's own."""
    for member in range(1, 1 + others.num_members):
        held = {t.dense: others.matrix(ModelTensor(t.dense, t.shape), member) for t in stack}
        whose = f"of {others.found_in(member)}"
        yield {n: finite(tensor, f"{n} {whose}").to(dense[n].dtype) for n, tensor in held.items()}


def _routers(
    prefix: str, moe: PretrainedConfig, settings: MoeSettings, start: str, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    # The last weight makes the logits: zeros make every expert as likely. Weights before it are drawn with
    # variance 1 / inputs either way: zeros there would leave the last one without a gradient.
    shapes = make_router(settings.router, moe.hidden_size, settings.num_routed_experts).state_dict()
    for number, (name, weight) in enumerate(shapes.items()):
        last = number == len(shapes) - 1
        std = settings.router_init_std if last else weight.shape[1] ** -0.5
        drawn = torch.randn(weight.shape, generator=generator) * (0.0 if last and start == "zero" else std)
        yield f"{prefix}.gate.{name}", drawn.to(moe.dtype)


def _compare(options: Upcycle, source: ModelFolder, draft: Draft, device: torch.device) -> None:
    """Largest difference between the scores of dense model and MoE on a probe batch."""
    moe = moe_to_look_at(draft.folder, str(device))
    texts, dtype = probe_texts(moe.config, options.seed), moe.dtype
    ours_B = probe_scores(moe, texts, prompt_lengths=True)
    # A fresh head is drawn, not read: the dense model gets the MoE\'s, to be compared with.
    head = {n: p.detach().clone() for n, p in moe.state_dict().items() if n in draft.results["fresh_head"]}
    del moe
    dense = load_reward_model(source, device, dtype, options.seed if head else None)
    dense.load_state_dict(head, strict=False)
    theirs_B = probe_scores(dense, texts)
    difference = draft.results["largest_difference"] = largest_difference(ours_B, theirs_B)
    log.debug("upcycle: largest difference to the dense model %.2e", difference)
    if not options.expert_noise:
        what = "the MoE does not equal the dense model"
        fix = "report this architecture; the model may change its MLP in a way that is not known here"
        require_alike(ours_B, theirs_B, dtype, what, fix)
