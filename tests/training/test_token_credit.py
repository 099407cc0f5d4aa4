"""Credit by token: closed form, other tokens, chats, the gradient by hand, and that it moves no optimum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_policy import CHAT, save_last_word_model, save_policy, write_prompts
from tiny_models import save_dense, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import moemerge
from moemerge.data.tokenise import Item
from moemerge.errors import OptionError, UnsupportedError
from moemerge.evaluation.credit import Credit, token_credit
from moemerge.models.scorers import open_scorer
from moemerge.options.optimise import Optimise
from moemerge.training.policy import token_ends
from moemerge.training.policy_gradient import TokenCreditTrainer, optimise_policy

SHORT: dict[str, Any] = {
    "steps": 2,
    "batch_size": 8,
    "answers_per_prompt": 4,
    "learning_rate": 3e-2,
    "max_new_tokens": 4,
    "measure_prompts": 4,
    "measure_answers": 1,
    "measure_steps": 1,
    "resamples": 100,
}


def credit_of(folder: Path) -> Credit:
    return token_credit(open_scorer(folder), torch.device("cpu"), 100)


def ends_of(item: Item) -> list[int]:
    """The policy's tokens are words, and its end token."""
    words = item[1].split()
    return [len(" ".join(words[: n + 1])) for n in range(len(words))] + [len(item[1])]


def test_words_in_closed_form(tmp_path: Path) -> None:
    """A model of last words: a word earns what it is worth minus what the word before it is worth."""
    folder = save_last_word_model(tmp_path / "rm", "w7")
    items = [("w3 ", "w7 w5 w7"), ("w3 ", "w5")]
    worth = {w: moemerge.token_rewards(folder, [(w, " w1")])[0].prompt_score for w in ("w3", "w5", "w7")}
    scores, earned = credit_of(folder)(items, [ends_of(item) for item in items])
    steps = [worth["w7"] - worth["w3"], worth["w5"] - worth["w7"], worth["w7"] - worth["w5"], 0.0]
    np.testing.assert_allclose(earned[0], steps, atol=1e-6)
    np.testing.assert_allclose(earned[1], [worth["w5"] - worth["w3"], 0.0], atol=1e-6)
    np.testing.assert_allclose(scores, [worth["w7"], worth["w5"]], atol=1e-6)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(["<eos>", *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_a_policy_of_other_tokens(tmp_path: Path) -> None:
    """A policy of bytes: a word is earned by its last byte, the end token's part by the last token."""
    folder, tokenizer = save_dense(tmp_path / "rm"), byte_tokenizer()
    prompt, answer = "w1 w2 ", "w3 wé w5"
    ids = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
    ends = token_ends(tokenizer, prompt, ids)
    assert ends == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]  # of é the first byte alone is no letter yet
    (score,), (earned,) = credit_of(folder)([(prompt, answer)], [ends])
    (found,) = moemerge.token_rewards(folder, [(prompt, answer)])
    w3, unknown, w5, end = found.rewards
    np.testing.assert_allclose(earned, [0, w3, 0, 0, 0, unknown, 0, 0, w5, end], atol=1e-6)
    assert sum(earned) == pytest.approx(found.score - found.prompt_score, abs=1e-6)
    assert score == found.score


def test_chats_and_templates_that_change_the_answer(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "rm")
    (folder / "chat_template.jinja").write_text(CHAT)
    item = ([{"role": "user", "content": "w3"}], [{"role": "assistant", "content": "w4 w5"}])
    (found,) = moemerge.token_rewards(folder, [item])
    _, (earned,) = credit_of(folder)([item], [[2, 5, 5]])
    # The template's own word before the answer is earned with the answer's first one.
    assistant, w4, w5 = found.rewards
    np.testing.assert_allclose(earned, [assistant + w4, w5, 0], atol=1e-6)
    (folder / "chat_template.jinja").write_text(CHAT.replace("m.content", "m.content | upper"))
    (found,) = moemerge.token_rewards(folder, [item])
    _, (earned,) = credit_of(folder)([item], [[2, 5, 5]])
    np.testing.assert_allclose(earned, [0, 0, found.score - found.prompt_score], atol=1e-6)


@pytest.fixture
def trained(tmp_path: Path) -> Any:
    """A run against a model of last words, and its first batch and gradient."""

    def run(weight: float) -> dict[str, Any]:
        policy = AutoModelForCausalLM.from_pretrained(save_policy(tmp_path / f"policy-{weight}"))
        tokenizer = tiny_tokenizer()
        options = Optimise(
            policy="p", models={"rm": "m"}, prompts="q", gold_model="g", output=tmp_path / "o",
            credit="token", credit_weight=weight, **SHORT,
        )  # fmt: skip
        caught: dict[str, Any] = {}

        def catch(self: Any, model: Any, inputs: Any) -> Any:
            loss = original(self, model, inputs)
            if not caught:
                names, weights = zip(*model.named_parameters(), strict=True)
                gradient = torch.autograd.grad(loss, weights, retain_graph=True)
                caught.update(inputs=inputs, names=names, gradient=gradient)
            return loss

        original = TokenCreditTrainer._compute_loss
        patch = pytest.MonkeyPatch()
        patch.setattr(TokenCreditTrainer, "_compute_loss", catch)
        credit = credit_of(save_last_word_model(tmp_path / f"rm-{weight}", "w7"))
        prompts = [f"w{n} w{n + 1} " for n in range(6)]
        optimise_policy(
            options, "rm", policy, tokenizer, prompts, lambda _: np.zeros(0), credit, lambda _: None, tmp_path
        )
        patch.undo()
        caught["start"] = AutoModelForCausalLM.from_pretrained(tmp_path / f"policy-{weight}")
        return caught

    return run


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_gradient_by_hand(trained: Any, weight: float) -> None:
    """Sum over tokens of (answer's advantage - weight * earned before) * grad log p, mean over answers."""
    caught = trained(weight)
    inputs, model = caught["inputs"], caught["start"]
    ids_BT, start = (
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        inputs["prompt_ids"].shape[1],
    )
    assert (inputs["prompt_mask"] == 1).all(), "prompts of one length: positions need no care"
    log_BT = model(ids_BT).logits[:, start - 1 : -1].log_softmax(-1)
    log_BT = log_BT.gather(-1, inputs["completion_ids"][..., None])[..., 0]
    advantage_BT = inputs["advantages"][:, None] - inputs["baselines"]
    wanted = torch.autograd.grad(
        (advantage_BT * inputs["completion_mask"] * log_BT).sum() / len(ids_BT), [*model.parameters()]
    )
    for name, found, expected in zip(caught["names"], caught["gradient"], wanted, strict=True):
        torch.testing.assert_close(found, -expected, atol=2e-6, rtol=1e-3, msg=name)
    assert bool((inputs["baselines"][:, 0] == 0).all()) and bool(inputs["baselines"].any()) == (weight > 0)


def test_what_was_earned_before_moves_no_expected_gradient() -> None:
    """All answers of 2 tokens out of 3, counted: the expected gradient is the plain one, its variance not."""
    draw = torch.Generator().manual_seed(0)
    first_V, second_VV = (
        torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in (3, (3, 3))
    )
    reached = {(): 0.3, **{(a,): 0.5 * a for a in range(3)}}
    reached |= {(a, b): float(a == b) + 0.1 * b for a in range(3) for b in range(3)}

    def moments(weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the gradient's estimate from one answer."""
        mean, square = torch.zeros(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
        for a in range(3):
            for b in range(3):
                log_a, log_b = first_V.log_softmax(0)[a], second_VV[a].log_softmax(0)[b]
                earned = weight * (reached[(a,)] - reached[()])
                told = reached[(a, b)] * log_a + (reached[(a, b)] - earned) * log_b
                gradient = torch.cat([g.flatten() for g in torch.autograd.grad(told, [first_V, second_VV])])
                chance = (log_a + log_b).exp().detach()
                mean, square = mean + chance * gradient, square + chance * gradient**2
        return mean, square - mean**2

    plain, shaped = moments(0.0), moments(1.0)
    torch.testing.assert_close(shaped[0], plain[0], atol=1e-14, rtol=0)
    assert (shaped[1] - plain[1]).abs().max() > 0.01


def test_weight_0_is_the_plain_run(tmp_path: Path) -> None:
    given = {
        "policy": str(save_policy(tmp_path / "policy")),
        "models": {"rm": str(save_dense(tmp_path / "rm"))},
        "prompts": write_prompts(tmp_path / "prompts.jsonl", 20),
        "gold_model": str(save_last_word_model(tmp_path / "gold", "w7")),
        **SHORT,
    }
    ways = {"plain": {}, "nothing": {"credit": "token", "credit_weight": 0.0}, "token": {"credit": "token"}}
    runs = {
        name: json.loads(
            (moemerge.optimise(**given, **way, output=tmp_path / name) / "report.json").read_text()
        )
        for name, way in ways.items()
    }
    assert runs["plain"] == runs["nothing"]  # to the last bit
    assert runs["plain"]["models"] != runs["token"]["models"]


def test_faults(tmp_path: Path) -> None:
    given = {
        "policy": str(save_policy(tmp_path / "policy")),
        "models": {"rm": str(save_dense(tmp_path / "rm", "bert"))},
        "prompts": write_prompts(tmp_path / "prompts.jsonl", 20),
        "gold_function": lambda prompt, answer: 0.0,
        "output": tmp_path / "out",
        **SHORT,
    }
    with pytest.raises(OptionError, match="credit_weight goes with credit token"):
        moemerge.optimise(**given, credit_weight=0.5)
    with pytest.raises(UnsupportedError, match="what each token adds"):
        moemerge.optimise(**given, credit="token")
