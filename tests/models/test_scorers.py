"""Scorers that are no classifiers, against plain transformers and TRL, a text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import encoded, rows, write
from tiny_models import SIZES, TINY, save_dense, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from trl.trainer.utils import selective_log_softmax

from moemerge.artifacts.inputs import digests, fingerprints
from moemerge.artifacts.json_file import read_object, write_json
from moemerge.data.tokenise import Encoded, texts_of
from moemerge.errors import CheckpointError, MoemergeError, OptionError
from moemerge.models import language_head
from moemerge.models.folder import ModelFolder
from moemerge.models.language_model import LanguageModel
from moemerge.models.loading import load_tokenizer
from moemerge.models.scorers import open_scorer
from moemerge.models.scorers.classifier import Classifier
from moemerge.options.base import name_of
from moemerge.options.placement import Placement
from moemerge.stages.evaluate import evaluate

CPU = torch.device("cpu")
BOTH = {"kind": "implicit", "policy": "policy", "reference": "reference", "beta": 0.3}


def save_language_model(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**SIZES, **TINY[family], **changes})
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def scorer(folder: Path, **fields: Any) -> str:
    folder.mkdir(exist_ok=True)
    write_json(folder / "scorer.json", fields)
    return str(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, its reference, a reward model, pairs, and a scorer of the two; read only."""
    folder = tmp_path_factory.mktemp("scorers")
    save_language_model(folder / "policy", seed=1)
    save_language_model(folder / "reference", seed=2)
    save_dense(folder / "rm")
    write(folder / "pairs.jsonl", rows(12, 1))
    write_json(folder / "dpo.scorer.json", BOTH)
    return folder


@pytest.fixture(scope="module")
def texts(home: Path) -> list[Encoded]:
    return texts_of(encoded(load_tokenizer(ModelFolder(home / "policy")), home / "pairs.jsonl"))


@torch.no_grad()
def by_trl(model: Any, text: Encoded, pads: int) -> Tensor:
    """log p(answer | prompt) as TRL's DPOTrainer sums it, with so many pad tokens behind the text."""
    ids_1T = torch.tensor([text.ids + [0] * pads])
    mask_1T = torch.tensor([[1] * len(text.ids) + [0] * pads])
    answer_1T = mask_1T.clone()
    answer_1T[0, : text.prompt_length] = 0
    logits_1TV = model(input_ids=ids_1T, attention_mask=mask_1T).logits[:, :-1]
    log_1T = selective_log_softmax(logits_1TV, ids_1T[:, 1:])
    return log_1T.masked_fill(answer_1T[:, 1:] == 0, 0).sum(1)[0]


@torch.no_grad()
def by_hand(model: Any, text: Encoded) -> Tensor:
    """The same by plain transformers, in float64."""
    log_TV = model(torch.tensor([text.ids])).logits[0].double().log_softmax(-1)
    places = range(max(1, text.prompt_length), len(text.ids))
    return torch.stack([log_TV[place - 1, text.ids[place]] for place in places]).sum()


@pytest.mark.parametrize("pads", [0, 1, 50])
def test_implicit_rewards_are_those_of_plain_models_a_text_at_a_time(
    home: Path, texts: list[Encoded], pads: int
) -> None:
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(home / name) for name in ("policy", "reference")
    )
    found_C = open_scorer(home / "dpo.scorer.json").load(CPU).score(texts, 64)
    for text, found in zip(texts, found_C.tolist(), strict=True):
        of_hand = 0.3 * (by_hand(policy, text) - by_hand(reference, text))
        of_trl = 0.3 * (by_trl(policy, text, pads) - by_trl(reference, text, pads))
        assert found == pytest.approx(of_hand.item(), abs=2e-5)
        assert found == pytest.approx(of_trl.item(), abs=2e-5)


def test_padding_and_batches_change_nothing(home: Path, texts: list[Encoded]) -> None:
    loaded = open_scorer(home / "dpo.scorer.json").load(CPU)
    alone_C = torch.cat([loaded.score([text], 64) for text in texts])
    longest = Encoded(texts[0].ids + [5] * 50, texts[0].prompt_length)
    beside_C = torch.stack([loaded.score([text, longest], 4096)[0] for text in texts])
    torch.testing.assert_close(beside_C, alone_C, atol=2e-6, rtol=0)
    torch.testing.assert_close(loaded.score(texts, 100_000), alone_C, atol=2e-6, rtol=0)


def test_without_reference_and_by_token(home: Path, texts: list[Encoded], tmp_path: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(home / "policy")
    made = scorer(tmp_path / "free", kind="implicit", policy=str(home / "policy"), beta=1.0, per_token=True)
    found_C = open_scorer(made).load(CPU).score(texts, 512)
    for text, found in zip(texts, found_C.tolist(), strict=True):
        count = len(text.ids) - text.prompt_length
        assert found == pytest.approx(by_hand(policy, text).item() / count, abs=2e-5)


@pytest.mark.parametrize("family", ["bloom", "gemma2", "gpt2", "opt", "phi"])
def test_every_kind_of_language_model_is_taken_in_two(
    tmp_path: Path, family: str, texts: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales, caps and biases of heads are kept; logits come in small parts."""
    monkeypatch.setattr(language_head, "NUMBERS", 200)
    save_language_model(tmp_path / family, family)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / family)
    model = LanguageModel(ModelFolder(tmp_path / family), CPU)
    found_B, count_B = model.log_probabilities(texts[:5])
    expected_B = torch.stack([by_hand(whole, text) for text in texts[:5]])
    torch.testing.assert_close(found_B.double(), expected_B, atol=2e-4, rtol=0)
    assert count_B.tolist() == [len(text.ids) - text.prompt_length for text in texts[:5]]
    assert model.facts["class"] == type(whole).__name__
    assert model.facts["parameters"] == sum(weight.numel() for weight in whole.parameters())


def test_a_tied_head_costs_what_an_untied_one_does(tmp_path: Path) -> None:
    flops = [
        LanguageModel(
            ModelFolder(save_language_model(tmp_path / str(tied), tie_word_embeddings=tied)), CPU
        ).facts["flops_per_token"]
        for tied in (True, False)
    ]
    assert flops[0] == flops[1]


def test_evaluate_has_a_scorer_beside_a_reward_model(home: Path, tmp_path: Path) -> None:
    options = {"pairs": {"t": str(home / "pairs.jsonl")}, "resamples": 100, "probes": ["accuracy", "length"]}
    models = [str(home / "rm"), str(home / "dpo.scorer.json")]
    out = evaluate(models, output=tmp_path / "e", **options)
    report = read_object(out / "report.json")
    assert list(report["models"]) == ["rm", "dpo"]
    facts = report["models"]["dpo"]
    assert facts["class"] == "implicit (LlamaForCausalLM)" and facts["source"].endswith("dpo.scorer.json")
    assert facts["parameters"] == 2 * LanguageModel(ModelFolder(home / "policy"), CPU).facts["parameters"]
    assert set(report["probes"]["accuracy"]["sets"]["t"]["all"]["models"]) == {"rm", "dpo"}


def test_a_scorers_fingerprint_is_that_of_all_its_models(home: Path, tmp_path: Path) -> None:
    save_language_model(tmp_path / "policy", seed=1)
    save_language_model(tmp_path / "reference", seed=2)
    made = scorer(tmp_path / "dpo", **BOTH | {"policy": "../policy", "reference": "../reference"})
    before = digests(fingerprints(made))
    assert digests(fingerprints(made)) == before
    save_language_model(tmp_path / "reference", seed=3)
    after = digests(fingerprints(made))
    assert after != before
    assert set(fingerprints(made)["sources"]) == {"policy", "reference"}


def test_what_is_a_scorer_and_what_is_a_model(home: Path, tmp_path: Path) -> None:
    assert name_of(str(home / "dpo.scorer.json")) == "dpo"
    assert isinstance(open_scorer(home / "rm"), Classifier)
    both = save_dense(tmp_path / "both")
    write_json(both / "scorer.json", BOTH)  # of a folder that is a model, any other file is its own affair
    assert isinstance(open_scorer(both), Classifier)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[]", "a list, not an object"),
        ("{", "Expecting"),
        ('{"kind": "implicit", "kind": "judge"}', "given twice"),
        ('{"policy": "policy"}', "unknown kind of scorer"),
        ('{"kind": "implicit"}', "missing option"),
        ('{"kind": "implicit", "policy": "policy", "referense": "r"}', "did you mean 'reference'"),
        ('{"kind": "implicit", "policy": "policy", "beta": 0}', "bad option"),
        ('{"kind": "implicit", "policy": "policy", "beta": NaN}', "finite number"),
        ('{"kind": "implicit", "policy": "polic"}', "cannot be found: polic"),
        ('{"kind": "implicit", "policy": "rm"}', "is not a language model"),
        ('{"kind": "implicit", "policy": "policy", "reference": "other"}', "do not read the same tokens"),
    ],
)  # fmt: skip
def test_broken_scorers_are_refused(home: Path, tmp_path: Path, text: str, said: str) -> None:
    for name in ("policy", "rm"):
        (tmp_path / name).symlink_to(home / name)
    save_language_model(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path / "other")
    file = tmp_path / "a.scorer.json"
    file.write_text(text)
    with pytest.raises(MoemergeError, match=said) as fault:
        opened = open_scorer(file)
        opened.reader()
        opened.load(CPU)
    assert fault.value.fix and isinstance(fault.value, CheckpointError | OptionError)


@pytest.mark.parametrize("placement", [{"sharded": True}, {"device_map": "auto"}, {"precision": "bfloat16"}])
def test_a_scorer_is_not_loaded_in_parts(home: Path, placement: dict[str, Any]) -> None:
    with pytest.raises(MoemergeError, match="in parts"):
        open_scorer(home / "dpo.scorer.json").load(CPU, Placement(**placement))
