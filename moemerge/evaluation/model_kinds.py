"""What sort of model a stage wrote, in a card's words."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from moemerge.artifacts.json_file import read_object
from moemerge.artifacts.manifest import Manifest, flat_inputs
from moemerge.models.heads.saved import SavedHead, head_field, packages_of
from moemerge.options.merge import MergeSettings
from moemerge.reports.table import inert_markdown

MERGED = """A dense reward model: the experts of a mixture-of-experts reward model, merged per layer into
one MLP ({way}) with moemerge. It has the architecture and the cost of the dense
model that the mixture was made from. Its one output is the reward of prompt and answer together."""
NATIVE = """A dense reward model: the experts of a reward model that was a mixture of experts from the start,
merged per layer into one MLP ({way}) with moemerge. Its one output is the reward of prompt and answer
together. To be known of the result:

{caveats}"""
ROUTED = """A mixture of experts made with moemerge: the experts are the MLPs of whole reward models, and one
of them runs, picked by the prompt. It costs what one of them costs, and takes the memory of all. Its one
output is the reward of prompt and answer together."""
ASSEMBLED = """A mixture of experts made with moemerge of the MLPs of whole reward models. Nothing has been
trained or fitted since: its routers are drawn at random."""
AVERAGED = """A dense reward model: {count} models of one architecture merged into one ({way}) with
moemerge. It has the architecture and the cost of one of them. Its one output is the reward of prompt and
answer together."""
AVERAGE = """routing-normalised average, [XFT](https://arxiv.org/abs/2404.15247),
[UMM-RM](https://arxiv.org/abs/2512.00724)"""
MEAN = """weighted average, [model soups](https://arxiv.org/abs/2203.05482), [WARM](https://arxiv.org/abs/2401.12187)"""
SUM = """sum of the changes from their common start, [task arithmetic](https://arxiv.org/abs/2212.04089)"""
MEMBER = """A dense reward model: `{member}`, {what}, written as an ordinary checkpoint with moemerge.
Its one output is the reward of prompt and answer together."""
TAKEN = """A dense reward model: {name} as it is, which moemerge compared with others and copied. Its one
output is the reward of prompt and answer together."""
STOCK = """A mixture-of-experts reward model in the form of Qwen2-MoE, which stock transformers loads; it
gives the same rewards as the MoE that it was made from with moemerge. Its one output is the reward of prompt
and answer together."""
LINEAR = """A dense reward model whose linear head was fitted, by least squares, to a head of moemerge's own
that stock transformers lacks: on {agreement:.1%} of {held_out_pairs} pairs that it was not fitted to both
say that the same answer is better. Its one output is the reward of prompt and answer together."""
UPCYCLED = """A mixture-of-experts reward model, upcycled with moemerge from a dense one and not yet trained:
it computes the same rewards. Its one output is the reward of prompt and answer together."""
TRAINED = """A reward model trained on preference pairs with moemerge. Its one output is the reward of prompt
and answer together."""


NATIVE_FORM = "qwen2_moe"
SHORT = 12  # digits of a checksum
OWN_HEAD = """Its reward head is not the linear one of stock transformers, but of kind `{kind}`
({width} factors): loading it needs `pip install {packages}`. Scores are its means: nothing is drawn."""


def kind_of(manifest: Manifest, folder: Path) -> str:
    """What sort of model this is, in a few sentences."""
    head = head_field(read_object(folder / "config.json"))
    if head is None:
        return _kind_of(manifest, folder)
    saved = SavedHead.read(head)
    told = OWN_HEAD.format(**asdict(saved), packages=" ".join(packages_of(saved.kind)))
    return f"{_kind_of(manifest, folder)}\n\n{told}"


def _kind_of(manifest: Manifest, folder: Path) -> str:
    if manifest["stage"] == "export":
        form = manifest["options"].get("form")
        if form in (NATIVE_FORM, "linear"):
            return STOCK if form == NATIVE_FORM else _linear(manifest)
        experts = manifest["options"].get("model") is not None
        what = (
            "one expert of a mixture-of-experts reward model" if experts else "made to be merged with others"
        )
        return MEMBER.format(member=folder.resolve().name, what=what)
    if manifest["stage"] != "merge":
        assembled = manifest["options"].get("experts")
        upcycled = ASSEMBLED if assembled else UPCYCLED
        return {"upcycle": upcycled, "gate": ROUTED}.get(manifest["stage"], TRAINED)
    if (taken := taken_input(manifest)) is not None:
        return TAKEN.format(name=source_name(flat_inputs(manifest)[taken]))
    host = host_method(manifest)
    mean = MEAN if manifest["options"].get("models") else AVERAGE
    ours = SUM if manifest["results"].get("coordinates") == "sum" else mean
    way = ours if host is None else f"[mergekit](https://github.com/arcee-ai/mergekit)'s method `{host}`"
    models = [*(manifest["options"].get("models") or []), manifest["options"].get("base")]
    count = sum(model is not None for model in models)
    caveats = "\n".join(f"- {inert_markdown(text)}" for text in manifest["results"].get("caveats", []))
    if caveats:
        return NATIVE.format(way=way, caveats=caveats)
    return AVERAGED.format(way=way, count=count) if count else MERGED.format(way=way)


def taken_input(manifest: Manifest) -> str | None:
    """The input to which a merge gave all the weight, so that it is taken as it is; None if there is none."""
    options, results = manifest["options"], manifest["results"]
    if manifest["stage"] != "merge" or host_method(manifest) or results.get("coordinates") == "sum":
        return None
    has_weight = [weight > 0 for weight in options.get("weights") or []]
    models = [f"models.{number}" for number in range(len(options.get("models") or []))]
    names = ["base", *models] if options.get("base") else models
    return names[has_weight.index(True)] if sum(has_weight) == 1 and len(has_weight) == len(names) else None


def source_name(record: dict[str, Any]) -> str:
    """The short name of an input in a card: that on the hub, or its last part and some digits of its sum."""
    if "hub" in record:
        return f"`{Path(record['hub']).name if Path(record['hub']).is_absolute() else record['hub']}`"
    return f"`{Path(record.get('path', '')).name}` ({record['sha256'][:SHORT]})"


def _linear(manifest: Manifest) -> str:
    results = manifest["results"]
    return LINEAR.format(agreement=results["agreement"], held_out_pairs=results["held_out_pairs"])


def host_method(manifest: Manifest) -> str | None:
    """mergekit's method that merged the model; None for the routing-normalised average."""
    ours = MergeSettings.model_fields["method"].default
    method = str(manifest["options"].get("method", ours))
    return None if method == ours else method
