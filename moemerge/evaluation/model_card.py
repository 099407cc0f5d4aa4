"""The model card: what a published model was made of, from what, and how well it does.

No local path gets into a card: files and folders appear by name and checksum.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from moemerge.artifacts.checksums import MANIFEST, fingerprint
from moemerge.artifacts.manifest import (
    Manifest,
    expect_stage,
    flat_inputs,
    read_manifest,
    stated_licence,
    written_by_stages,
)
from moemerge.artifacts.paths import reads_like_path
from moemerge.errors import ArtifactError
from moemerge.evaluation.cautions import without_copies
from moemerge.evaluation.measures import main_measures
from moemerge.evaluation.model_kinds import host_method, kind_of, source_name, taken_input
from moemerge.evaluation.page import numbers_to_see_first
from moemerge.evaluation.probes import PROBES
from moemerge.evaluation.report import Report, read_report
from moemerge.evaluation.scoring_code import scoring_code, scoring_words
from moemerge.evaluation.verdict import standing
from moemerge.models.folder import ModelFolder
from moemerge.options.base import Run
from moemerge.options.publish import Publish
from moemerge.registry import Registry
from moemerge.reports.table import Table, inert_markdown

# Inputs that are models of which another one was made.
ORIGINS = ("model", "models", "base", "experts", "language_models")
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
PLAIN_NAME = re.compile(r"[\w.+-]+")  # of a plot: others could end the link that shows it
MODEL_STAGES = ("merge", "train", "upcycle", "gate", "export")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that holds the published model: the report, and the model's name in it."""

    folder: Path
    report: Report
    model: str

    @property
    def plots(self) -> list[Path]:
        """The files beside the report that it names as its plots."""
        named = set(self.report["plots"])
        return [path for path in sorted(self.folder.iterdir()) if path.name in named and path.is_file()]


def make_card(options: Publish, option_classes: Registry[type[Run]]) -> ModelCard:
    """The card of `options.model`, from its manifest and those of everything that it came from.

    option_classes: those of the stages by name; the card shows options that differ from their defaults.

    Raises ArtifactError if no stage wrote the folder as a model, the evaluation does not hold it, or what
    manifests and report hold is not what a stage writes there.
    """
    with written_by_stages(
        "no card can be made from these manifests and this report",
        "run the stage that wrote the model, or evaluate, again",
    ):
        return _card(options, option_classes)


def _card(options: Publish, option_classes: Registry[type[Run]]) -> ModelCard:
    folder = Path(options.model)
    home = home_of(folder)
    manifest = expect_stage(home, *MODEL_STAGES)
    _require_one_model(folder, manifest)
    evaluation = find_evaluation(folder, options.evaluation) if options.evaluation else None
    chain = _of_taken(ancestors(manifest))
    title = options.repo or folder.resolve().name
    data = _card_data(title, options, chain, evaluation)
    said = {
        "title": inert_markdown(title),
        "kind": kind_of(manifest, folder),
        "words": scoring_words(chain),
        "code": scoring_code(title, folder),
        "limits": _fresh_heads(chain),
        "origin": _origin(chain),
        "stages": _made_from(chain, option_classes),
        "coefficients": _coefficients(manifest),
        "cited": _cited(manifest),
        **(_evaluation(evaluation) if evaluation else {}),
    }
    return ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), **said)


def _origin(chain: list[Manifest]) -> str:
    """Models and data at the start of the chain, in a line."""
    names = dict.fromkeys(source_name(record) for record in _origins(chain))
    data = dict.fromkeys(
        source_name(record)
        for manifest in chain
        for name, record in flat_inputs(manifest).items()
        if manifest["stage"] == "train" and name == "pairs"
    )
    trained = f", trained on {', '.join(data)}" if data else ""
    stages = f"{len(chain)} stage{'s' * (len(chain) > 1)}"
    return f"{', '.join(names) or 'Models that manifests do not name'}{trained}, in {stages}."


def _cited(manifest: Manifest) -> str:
    """The papers whose method the model is made by."""
    if manifest["stage"] == "upcycle":
        return "; upcycling: arXiv 2212.05055"
    merges_experts = manifest["stage"] == "merge" and manifest["options"].get("model")
    ours = merges_experts and host_method(manifest) is None
    return "; merging: XFT (arXiv 2404.15247), UMM-RM (arXiv 2512.00724)" if ours else ""


def home_of(model: Path) -> Path:
    """The artifact that `model` is, or, if export wrote it, is a member of."""
    above = model.resolve().parent
    if not (model / MANIFEST).is_file() and (above / MANIFEST).is_file():
        expect_stage(above, "export")
        return above
    return model


def _require_one_model(folder: Path, manifest: Manifest) -> None:
    if (folder / "config.json").is_file():
        return
    members = manifest["results"].get("models", [])
    raise ArtifactError(
        f"{folder} is not one model",
        given=f"the {len(members)} models that export wrote there" if members else "no config.json",
        expected="a folder with one model",
        fix=f"publish one of them: {', '.join(str(folder / name) for name in members[:3])}"
        if members
        else "give the folder that merge, train, upcycle or export wrote",
    )


def find_evaluation(model: Path, folder: str) -> Evaluation:
    """The report in `folder`, and the name under which `model`, by its checksum, was evaluated.

    Of several equal models, the one that has the folder's name.
    """
    manifest = expect_stage(folder, "evaluate")
    wanted = _digest(model)
    records = manifest["inputs"]["models"]
    names = [name for name, record in records.items() if record["sha256"] == wanted]
    if not names:
        raise ArtifactError(
            "the evaluation does not hold the model to publish",
            given=f"evaluated: {', '.join(records)}; none equals {model}",
            expected="an evaluation of the very files to publish",
            fix="evaluate this model, or leave the evaluation out",
        )
    report = read_report(folder)
    own = model.resolve().name
    return Evaluation(Path(folder), report, own if own in names else names[0])


def ancestors(manifest: Manifest) -> list[Manifest]:
    """What a manifest carries of everything that its folder was made from, then itself.

    No path in it is followed: whoever wrote it would choose what is read.
    """
    if "chain" not in manifest:
        log.warning(
            "the card shows the last stage only: an older version wrote its manifest; run %s again to "
            "have all of them, from the first to the last",
            manifest["stage"],
        )
    return [*manifest.get("chain", []), manifest]


def _of_taken(chain: list[Manifest]) -> list[Manifest]:
    """The chain without what was made for models that its last stage gave no weight."""
    taken = taken_input(chain[-1])
    if taken is None:
        return chain
    made = {_sorted_sums(manifest["files"]): place for place, manifest in enumerate(chain[:-1])}
    queue, kept = [flat_inputs(chain[-1])[taken]], {len(chain) - 1}
    while queue:
        place = made.get(_sorted_sums(queue.pop().get("files", {})))
        if place is not None and place not in kept:
            kept.add(place)
            queue.extend(flat_inputs(chain[place]).values())
    return [chain[place] for place in sorted(kept)]


def _digest(path: Path) -> str:
    known = read_manifest(path)["files"] if (path / MANIFEST).is_file() else None
    return str(fingerprint(path, known)["sha256"])


def _card_data(
    title: str, options: Publish, chain: list[Manifest], evaluation: Evaluation | None
) -> ModelCardData:
    bases = [options.base_model] if options.base_model else _hub_bases(chain)
    is_merge = chain[-1]["stage"] == "merge" and taken_input(chain[-1]) is None
    merged = ["mergekit", "merge"] if is_merge else []
    is_mixture = ModelFolder(options.model).kind != "dense"
    mixture = ["mixture-of-experts"] if is_mixture else []
    licence: dict[str, Any] = (
        {"license": options.license} if options.license else _inherited_license(bases, chain)
    )
    return ModelCardData(
        base_model=bases if len(bases) > 1 else next(iter(bases), None),
        **licence,
        datasets=options.datasets or None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=[*merged, *mixture, "moemerge", "reward-model"],
        model_name=title,
        eval_results=_eval_results(evaluation) if evaluation else None,
    )


def _origins(chain: list[Manifest]) -> list[Manifest]:
    """Models that no stage of the chain made: those at its start."""
    made = {_sorted_sums(manifest["files"]) for manifest in chain}
    inputs = [
        record
        for manifest in chain
        for name, record in flat_inputs(manifest).items()
        if name.partition(".")[0] in ORIGINS
    ]
    return [record for record in inputs if _sorted_sums(record.get("files", {})) not in made]


def _sorted_sums(files: dict[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(file["sha256"] for file in files.values()))


def _hub_bases(chain: list[Manifest]) -> list[str]:
    names = dict.fromkeys(record.get("hub") for record in _origins(chain))
    return [name for name in names if name and not reads_like_path(name)]


def _inherited_license(bases: list[str], chain: list[Manifest]) -> dict[str, str]:
    """What the cards of the models at the start say of licences: in the hub's cache, or as a stage noted.

    Nothing, and a warning, where there is none, or where they differ.
    """
    cached = [try_to_load_from_cache(base, "README.md") for base in bases if base.count("/") == 1]
    cards = [stated_licence(Path(card).parent) for card in cached if isinstance(card, str)]
    stated = [*filter(None, cards)] or [*filter(None, (record.get("license") for record in _origins(chain)))]
    if stated and all(one == stated[0] for one in stated):
        return dict(stated[0])
    several = ", ".join(dict.fromkeys(one["license"] for one in stated))
    why = f"those of its models differ ({several})" if several else "no card of its models is on this machine"
    log.warning("the card names no licence: %s; set license", why)
    return {}


def _eval_results(evaluation: Evaluation) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-classification",
            task_name="Reward modelling",
            dataset_type=measure.dataset,
            dataset_name=measure.dataset,
            metric_type=measure.metric,
            metric_name=measure.metric_name,
            metric_value=round(measure.values[evaluation.model], 6),
        )
        for measure in main_measures(evaluation.report)
    ]


def _made_from(chain: list[Manifest], option_classes: Registry[type[Run]]) -> str:
    rows = [_stage_row(manifest, option_classes) for manifest in chain]
    table = Table(
        "Stages, in order", ["stage", "from", "settings other than the defaults", "moemerge", "when"], rows
    )
    return table.markdown().rstrip()


def _fresh_heads(chain: list[Manifest]) -> list[str]:
    """A line for each stage that drew a reward head: what a score means was learned after that, or never."""
    drew = [m["stage"] for m in chain if m.get("fresh_head") or m.get("results", {}).get("fresh_head")]
    asked = [f"{m['stage']} (`{m['options']['head']}`)" for m in chain if m["options"].get("head")]
    return [
        f"Stage {stage} drew a new reward head at random: it found none in the model that it was given."
        for stage in drew
    ] + [f"Stage {stage} drew a new reward head at random in place of any that there was." for stage in asked]


def _stage_row(manifest: Manifest, option_classes: Registry[type[Run]]) -> list[str]:
    sources = [f"{name}: {source_name(record)}" for name, record in flat_inputs(manifest).items()]
    changed = _changed_settings(manifest, option_classes)
    settings = [f"{name}={_brief(value)}" for name, value in changed.items()]
    version = manifest["versions"].get("moemerge", "")
    return [manifest["stage"], "; ".join(sources), ", ".join(settings), version, manifest["started"][:10]]


def _changed_settings(manifest: Manifest, option_classes: Registry[type[Run]]) -> dict[str, Any]:
    """Options other than their defaults, without paths and what does not change results."""
    if manifest["stage"] not in option_classes:
        return {}
    left_out = {*manifest["inputs"], *Run.model_fields} - {"seed"}
    declared = option_classes.get(manifest["stage"]).model_fields
    fields = {name: field for name, field in declared.items() if name not in left_out}
    recorded = {name: manifest["options"][name] for name in fields if name in manifest["options"]}
    return {
        name: value
        for name, value in recorded.items()
        if value != fields[name].get_default(call_default_factory=True)
    }


def _brief(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _coefficients(manifest: Manifest) -> str:
    """The coefficients that a model was merged with, block by block; "" if by none."""
    table = manifest["results"].get("table") if host_method(manifest) is None else None
    if not table or taken_input(manifest) is not None:
        return ""
    member = "model" if manifest["options"].get("models") else "expert"
    header = ["block", "shared", *(f"{member} {i}" for i in range(len(table[0][2])))]
    rows = [[str(block), f"{shared:.4f}", *(f"{a:.4f}" for a in alpha_N)] for block, shared, alpha_N in table]
    what = "merged tensor of the block" if member == "model" else "matrix of the layer's MLP"
    average = f"W = shared · W_shared + (1 - shared) · Σ_i {member}_i · W_i"
    added = f"W = W_shared + Σ_i {member}_i · (W_i - W_shared), so shared = 1 - Σ_i {member}_i"
    formula = added if manifest["results"].get("coordinates") == "sum" else average
    note = f"{formula}, for every {what}. {_scales(manifest)}".strip()
    return Table("Coefficients per block", header, rows, note).markdown().rstrip()


def _scales(manifest: Manifest) -> str:
    """What the models' scores were divided by before they were merged; "" if by nothing."""
    scales = manifest["results"].get("scales")
    if not isinstance(scales, list):
        return ""
    return f"Reward heads were divided by {', '.join(f'{scale:.4g}' for scale in scales)} first."


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """What the card says of an evaluation: the main numbers, plots, and all tables."""
    tables = [
        table
        for name, result in without_copies(evaluation.report).items()
        if name in PROBES
        for table in PROBES.get(name).tables(result)
    ]
    return {
        "name": inert_markdown(evaluation.model),
        "standing": inert_markdown(standing(evaluation.report)),
        "numbers": numbers_to_see_first(evaluation.report).markdown().rstrip(),
        "plots": [plot.name for plot in evaluation.plots if PLAIN_NAME.fullmatch(plot.name)],
        "details": "\n\n".join(table.markdown().rstrip() for table in tables),
    }
