"""Stage gate: a MoE whose experts are whole models' MLPs learns from pairs which expert suits which prompt.

Shapes: L layers with experts, N routed experts, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.stage import Draft, stage
from moemerge.data.draw import first
from moemerge.data.pairs import prompt_key
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import encode_pairs, require_prompts
from moemerge.errors import DataError, UnsupportedError
from moemerge.fitting.gate import Fitted, Passes, fit_gate
from moemerge.fitting.ridge import Ridge
from moemerge.models.checkpoint import copy_side_files, write_checkpoint
from moemerge.models.device import free_memory, use_device
from moemerge.models.families import family_of
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_tokenizer
from moemerge.models.modelling import layout_of, moe_to_look_at, write_moe_config
from moemerge.models.moe_settings import MoeSettings
from moemerge.options.gate import Gate

log = logging.getLogger(__name__)


@stage("gate", Gate)
def gate(options: Gate, draft: Draft) -> None:
    """Write the MoE with routers fitted in closed form; gate.json says what routing is worth.

    Every expert scores the pairs alone; how much better than the others it does on a prompt's pairs is
    regressed (ridge) on the prompt's mean state, which is what a prompt gate sees, at the first layer with
    experts; the layers above learn to choose alike. All else stays as it is. Raises UnsupportedError for a
    MoE that does not choose one expert by the prompt, DataError for unusable pairs, and for pairs without
    prompts or of a single one.
    """
    device = use_device(options)
    folder = ModelFolder(options.model)
    folder.require_moe()
    _require_prompt_gate(folder)
    tokenizer = load_tokenizer(folder)
    pairs, report = read_pairs(options.pairs, options)
    encoded = encode_pairs(tokenizer, first(pairs, options.max_pairs, report), options, report)
    require_prompts(encoded)
    prompts = len({prompt_key(pair.pair) for pair in encoded})
    _require_several(prompts)
    model = moe_to_look_at(folder, str(device))
    fitted = fit_gate(Passes(model, tokenizer, encoded, options.batch_tokens))
    del model
    free_memory()
    _write(options, folder, fitted.layers, draft)
    draft.results |= _numbers(fitted) | {
        "pairs": len(encoded), "prompts": prompts, "rows": report.told(),
    }  # fmt: skip
    write_json(draft.folder / "gate.json", draft.results)
    log.debug("gate: %s", draft.results["sentence"])


def _require_prompt_gate(folder: ModelFolder) -> None:
    settings = MoeSettings.read(folder.config.moemerge)
    given = {"gate": settings.gate, "router": settings.router, "shared_expert": settings.shared_expert}
    given["num_experts_per_tok"] = settings.num_experts_per_tok
    wanted = {"gate": "prompt", "router": "linear", "shared_expert": False, "num_experts_per_tok": 1}
    if given != wanted:
        raise UnsupportedError(
            "this MoE does not choose one expert by the prompt",
            given=", ".join(f"{name} {value}" for name, value in given.items() if value != wanted[name]),
            expected=", ".join(f"{name} {value}" for name, value in wanted.items()),
            fix="make one: moemerge upcycle --model M --experts A B C --gate prompt --no-shared-expert",
        )


def _require_several(count: int) -> None:
    if count < 2:
        raise DataError(
            "a gate cannot be fitted to one prompt",
            given=f"pairs of {count} prompt(s)",
            expected="pairs of several prompts: each one's expert is told by the others",
            fix="give pairs of the kinds of prompts that the model will see",
        )


def _write(options: Gate, folder: ModelFolder, layers: Sequence[Ridge], draft: Draft) -> None:
    """The MoE's checkpoint with other routers."""
    draft.reserve(sum(path.stat().st_size for path in folder.folder.glob("*.safetensors")))
    write_checkpoint(draft.folder, _tensors(folder, layers), options.shard_size)
    write_moe_config(draft.folder, folder.config, layout_of(folder.config))
    copy_side_files(folder.folder, draft.folder)


def _tensors(folder: ModelFolder, layers: Sequence[Ridge]) -> Iterator[tuple[str, Tensor]]:
    stacks = family_of(folder.config).expert_tensors(folder.config)
    prefixes = dict.fromkeys(tensor.home for tensor in stacks)
    routers = {
        f"{prefix}.gate.weight": torch.from_numpy(layer.weight_ND)
        for prefix, layer in zip(prefixes, layers, strict=True)
    }
    for name in folder.weights.names:
        yield (
            name,
            routers[name].to(folder.weights.dtype(name)) if name in routers else folder.weights.tensor(name),
        )


def _numbers(fitted: Fitted) -> dict[str, object]:
    sentence = (
        f"right on {fitted.routed:.1%} of the pairs with each prompt's expert chosen by the other prompts, "
        f"on {fitted.single:.1%} with the best expert alone, on {fitted.known:.1%} with each prompt's best"
    )
    names = ("routed", "single", "known", "agreement")
    return {"sentence": sentence} | {name: getattr(fitted, name) for name in names}
