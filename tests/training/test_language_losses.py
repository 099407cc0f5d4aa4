"""Losses by a language head on the trunk, against plain transformers' log-probabilities, a text at a time."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import brute_force, encoded, history, moved, raiser, rows, run, weights, write
from tiny_models import SIZES, TINY, families, save_dense, tiny_tokenizer
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moemerge.data.pairs import Pair
from moemerge.data.tokenise import Encoded, EncodedPair
from moemerge.errors import CheckpointError, DataError, UnsupportedError
from moemerge.models import language_head
from moemerge.models.families import FAMILIES
from moemerge.models.folder import ModelFolder
from moemerge.models.language_head import open_language_head
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.pooling import last_states
from moemerge.options.train import Train
from moemerge.stages.upcycle import upcycle
from moemerge.training.losses.base import Batch, Course
from moemerge.training.losses.mixture import Mixture
from moemerge.training.pair_columns import PairCollator, pair_columns

STEADY = {"schedule": "constant", "warmup": 0.0, "patience": None}
pytestmark = pytest.mark.usefixtures("no_figures")


def save_language_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny language model with its tokenizer."""
    torch.manual_seed(7)
    config = CONFIG_MAPPING[family](**{**SIZES, **TINY[family], "num_labels": 2, **changes})
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model (untied and tied), a reward model made from it, its MoE, and pairs; read only."""
    folder = tmp_path_factory.mktemp("spoken")
    write(folder / "train.jsonl", rows(24, 1))
    write(folder / "held.jsonl", rows(9, 2))
    save_language_model(folder / "lm")
    save_language_model(folder / "tied", tie_word_embeddings=True)
    rm = AutoModelForSequenceClassification.from_pretrained(folder / "lm", num_labels=1)
    rm.save_pretrained(folder / "rm")
    tiny_tokenizer().save_pretrained(folder / "rm")
    made = {"num_routed_experts": 4, "num_experts_per_tok": 2, "router_init_std": 0.5}
    upcycle(model=str(folder / "rm"), output=folder / "moe", balance_coefficient=0.1, **made)
    return folder


def course_of(spoken: Path, home: Path, model: str, **options: Any) -> Course:
    """What the losses of a training in float64 may look at."""
    given = {"model": str(spoken / model), "output": home / "out", "pairs": str(spoken / "train.jsonl")}
    folder = ModelFolder(given["model"])
    loaded = load_reward_model(folder, "cpu", torch.float64, 0)
    pairs = encoded(load_tokenizer(folder), spoken / "train.jsonl")
    return Course(Train(**given, **options), loaded, pairs, 0, home, nullcontext)


def batch_of(course: Course, mixture: Mixture, places: list[int], pads: int = 0) -> Batch:
    """The model's answers on the pairs at these places, with so much more padding."""
    table = pair_columns(course.pairs, prompts=True, places=True)
    inputs = dict(PairCollator(pad_token_id=0)([table[place] for place in places]))
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, pads))
    return mixture.answer(course.model, inputs, inputs.pop("places"), 0)


def log_probability(model: Any, text: Encoded) -> Tensor:
    """Of the answer after its prompt, by a plain language model: summed over its tokens."""
    log_TV = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
    places = range(max(1, text.prompt_length), len(text.ids))
    return torch.stack([log_TV[place - 1, text.ids[place]] for place in places]).sum()


def disturb(parameters: dict[str, torch.nn.Parameter], seed: int = 3) -> None:
    """Move them, each by draws of its own name."""
    with torch.no_grad():
        for number, name in enumerate(sorted(parameters)):
            generator = torch.Generator().manual_seed(seed + number)
            noise = torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64)
            parameters[name].add_(0.1 * noise)


def attention(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trunk's parameters that a MoE and its dense model have under one name."""
    return {n: p for n, p in model.named_parameters() if "self_attn" in n or "embed_tokens" in n}


@pytest.mark.parametrize("model, lm", [("lm", "lm"), ("moe", "lm"), ("tied", "tied")])
def test_losses_and_gradients_are_those_of_a_plain_language_model(
    spoken: Path, tmp_path: Path, model: str, lm: str
) -> None:
    """Policy and language together, after the trunk has moved; where the head is tied it trains along."""
    head = {"language_head": str(spoken / "lm")} if model == "moe" else {}
    mixed = {"objectives": {"policy": 0.7, "language": 0.2}, "policy_temperature": 0.3}
    course = course_of(spoken, tmp_path, model, **mixed, **head)
    mixture = Mixture(course)
    start, now = (AutoModelForCausalLM.from_pretrained(spoken / lm, dtype=torch.float64) for _ in range(2))
    disturb(attention(course.model))
    disturb(attention(now))
    places = [6, 1, 9, 3, 0]
    pairs = [course.pairs[place] for place in places]
    losses = []
    for pair in pairs:
        chosen, rejected = log_probability(now, pair.chosen), log_probability(now, pair.rejected)
        before = log_probability(start, pair.chosen) - log_probability(start, pair.rejected)
        count = len(pair.chosen.ids) - pair.chosen.prompt_length
        dpo = -torch.sigmoid(0.3 * (chosen - rejected - before)).log()
        losses.append(0.7 * dpo - 0.2 * chosen / count)
    wanted = torch.stack(losses).mean()
    wanted.backward()
    # 17 pads more, and nothing changes.
    found = mixture.total(mixture.terms(batch_of(course, mixture, places, pads=17)))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
    course.model.zero_grad()
    found.backward()
    for name, parameter in attention(now).items():
        gradient = course.model.get_parameter(name).grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-7, atol=1e-10, msg=name)
    assert attention(now)["model.embed_tokens.weight"].grad.abs().sum() > 0


def test_grms_form_is_its_formula(spoken: Path, tmp_path: Path) -> None:
    options = {"objectives": {"language": 1}, "language_form": "sigmoid", "policy_temperature": 0.02}
    course = course_of(spoken, tmp_path, "lm", **options)
    mixture = Mixture(course)
    lm = AutoModelForCausalLM.from_pretrained(spoken / "lm", dtype=torch.float64)
    found = mixture.terms(batch_of(course, mixture, [3, 1]))["language"]
    log_2 = torch.stack([log_probability(lm, course.pairs[place].chosen) for place in (3, 1)])
    assert found.item() == pytest.approx(-logsigmoid(0.02 * log_2).mean().item(), rel=1e-10)


def test_logits_are_made_in_pieces_and_never_kept(
    spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives = {"policy": 1.0, "language": 1.0}
    vocabulary, found, kept = SIZES["vocab_size"], [], []
    assert isinstance(vocabulary, int)
    for size in (2**24, 3 * vocabulary):
        monkeypatch.setattr(language_head, "NUMBERS", size)
        course = course_of(spoken, tmp_path / str(size), "lm", objectives=objectives)
        course.home.mkdir()
        mixture = Mixture(course)
        disturb(attention(course.model))

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = mixture.total(mixture.terms(batch_of(course, mixture, [0, 1, 2])))
        loss.backward()
        found.append([loss, *(p.grad for p in attention(course.model).values())])
    assert kept and not [shape for shape in kept if shape[-1:] == (vocabulary,)]
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-9, atol=1e-12)


def test_policy_starts_at_ln_2_and_leaves_an_ordinary_reward_model(spoken: Path, tmp_path: Path) -> None:
    """At the first step no odds have moved, in a MoE either; its gradient is told; no head is saved."""
    options: dict[str, Any] = {"language_head": str(spoken / "lm"), "max_steps": 4, "eval_steps": 1, **STEADY}
    objectives = {"bradley_terry": 1, "policy": 0.2}
    results = run(spoken, tmp_path / "out", "moe", True, objectives=objectives, learning_rate=1e-3, **options)
    policy = [entry["policy_loss"] for entry in history(tmp_path / "out") if "loss" in entry]
    assert policy[0] == pytest.approx(math.log(2), abs=1e-6) and policy[-1] != policy[0]
    assert results["terms"]["policy"]["gradient_ratio"] > 0
    assert weights(tmp_path / "out").keys() == weights(spoken / "moe").keys()
    assert brute_force(tmp_path / "out", spoken / "held.jsonl") == pytest.approx(
        tuple(results["after"].values()), abs=1e-6
    )


def test_a_killed_run_with_every_loss_ends_as_an_unbroken_one(
    spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odds of the start are computed once; what is drawn (contrast, lookahead) follows from seed and step."""
    from moemerge.training.trainer import PairTrainer

    sets = [{"prompt": "w1 ", "candidates": [{"text": f"w{i} w{j}"} for j in range(3)]} for i in range(5)]
    options: dict[str, Any] = {
        "objectives": {"bradley_terry": 1, "policy": 0.5, "language": 0.1, "contrast": 0.3},
        **{"label_smoothing": 0.1, "center": 0.1, "lookahead": write(tmp_path / "sets.jsonl", sets)},
        **{"max_steps": 3, "eval_steps": 1, "learning_rate": 3e-3, "batch_size": 7},
    }
    step = PairTrainer.training_step
    straight = run(spoken, tmp_path / "straight", "lm", True, **options)

    def killed(self: Any, *given: Any) -> Any:
        return raiser("killed")() if self.state.global_step == 2 else step(self, *given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(PairTrainer, "training_step", killed)
        run(spoken, tmp_path / "killed", "lm", True, **options)
    monkeypatch.setattr("moemerge.training.losses.policy._log_odds", raiser("computed again"))
    resumed = run(spoken, tmp_path / "killed", "lm", True, **options)
    assert not moved(tmp_path / "straight", tmp_path / "killed")
    assert history(tmp_path / "straight") == history(tmp_path / "killed")
    assert {**straight, "seconds": 0} == {**resumed, "seconds": 0}


@pytest.mark.parametrize("family", families(name for name, known in FAMILIES.items() if known.causal))
def test_the_head_is_that_of_every_decoder(family: str, tmp_path: Path) -> None:
    """Softcaps, scales, biases, further layers before the vocabulary, old names: as transformers has them."""
    lm = AutoModelForCausalLM.from_pretrained(
        save_language_model(tmp_path / "lm", family), dtype=torch.float64
    )
    folder = ModelFolder(tmp_path / "lm")
    model = load_reward_model(folder, "cpu", torch.float64, 0)
    text = Encoded([5, 9, 17, 4, 33, 60, 1], 2)
    ids = torch.tensor([text.ids])
    for given in (None, folder):
        head = open_language_head(model, folder, given)
        with torch.no_grad(), last_states(model) as states:
            model(ids, use_cache=False)
            found, count = head.answers(states[0], ids, torch.ones_like(ids), torch.tensor([2]))
            assert count.tolist() == [5]
            assert found.item() == pytest.approx(log_probability(lm.eval(), text).item(), rel=1e-9)


def test_faults_name_the_remedy(spoken: Path, tmp_path: Path) -> None:
    save_dense(tmp_path / "bert", "bert")
    wide = save_language_model(tmp_path / "wide", vocab_size=70)
    other = save_language_model(tmp_path / "other", "mistral")
    asked = {"objectives": {"bradley_terry": 1, "policy": 0.2}, "max_steps": 1}
    for model, head, error, text in (
        (tmp_path / "bert", None, UnsupportedError, "(?s)encoder has no language head.*take policy and"),
        (spoken / "rm", None, CheckpointError, "(?s)rm has no language head.*set language_head to"),
        (spoken / "moe", wide, UnsupportedError, r"(?s)does not fit.*\(70, 32\).*\(64, 32\)"),
        (spoken / "moe", other, UnsupportedError, "(?s)does not fit.*model_type mistral, not llama"),
    ):
        with pytest.raises(error, match=text):
            run(spoken, tmp_path / "out", str(model), language_head=head and str(head), **asked)
    assert not (tmp_path / "out").exists()
    side = Encoded([3, 4, 5], 0)
    course = course_of(spoken, tmp_path, "lm", objectives={"language": 1})
    lost = Course(
        course.options,
        course.model,
        [EncodedPair(side, side, Pair("w0", "w1", "w2"))],
        0,
        tmp_path,
        nullcontext,
    )
    with pytest.raises(DataError, match="do not know where answers begin"):
        Mixture(lost)
    # Without a prompt the whole text is the answer.
    alone = Course(
        course.options,
        course.model,
        [EncodedPair(side, side, Pair("", "w1", "w2"))],
        0,
        tmp_path,
        nullcontext,
    )
    assert Mixture(alone).losses
