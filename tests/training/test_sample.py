"""Policies: sampling answers, their text, KL between policies; and the stage sample."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_policy import save_last_word_model, save_policy, write_prompts
from tiny_models import save_dense, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.reading import distinct, read_candidates, read_prompts
from moemerge.errors import CheckpointError, DataError, UnsupportedError
from moemerge.evaluation.gold import model_reward
from moemerge.models.language_model import load_language_model
from moemerge.options.base import TextFormat
from moemerge.stages.evaluate import evaluate
from moemerge.stages.sample import sample
from moemerge.training import policy as policies
from moemerge.training.policy import answer_text, kl_from, prompt_ids, sample_answers

CPU = torch.device("cpu")
PROMPTS: list[Any] = ["w1 w2 w3 w4 ", "w5 ", "w6 w7 "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policies") / "policy")


def read(path: Path) -> list[Any]:
    return read_candidates(str(path / "candidates.jsonl.gz"), TextFormat(), scored=False)[0]


def test_answers_are_drawn_from_the_policys_own_distribution(folder: Path) -> None:
    """First tokens of many answers to prompts of unequal length, padded, against the exact odds."""
    policy, tokenizer = load_language_model(str(folder), CPU)
    many = PROMPTS[:2] * 1000
    first_B = sample_answers(policy, tokenizer, many, 0, 1, temperature=0.25).ids_BT[:, -1]
    for place, prompt in enumerate(PROMPTS[:2]):
        with torch.no_grad():
            logits_V = policy(torch.tensor(prompt_ids(tokenizer, [prompt]))).logits[0, -1]
        expected = (logits_V / 0.25).softmax(0).numpy()
        found = np.bincount(first_B[place::2].numpy(), minlength=len(expected)) / 1000
        assert np.abs(found - expected).max() < 4 * np.sqrt(expected.max() / 1000)
        assert np.abs(found - expected[::-1]).max() > 4 * np.sqrt(expected.max() / 1000)


def test_one_seed_gives_one_answer_and_leaves_other_draws_alone(folder: Path) -> None:
    policy, tokenizer = load_language_model(str(folder), CPU)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (sample_answers(policy, tokenizer, PROMPTS, seed, 6) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.texts == again.texts != other.texts


def test_masks_end_with_the_first_end_token(folder: Path) -> None:
    policy, tokenizer = load_language_model(str(folder), CPU)
    answers = sample_answers(policy, tokenizer, PROMPTS * 40, 0, 30)
    assert 0 < answers.ended_B.float().mean() < 1
    for ids_T, mask_T, ended, text in zip(
        answers.ids_BT[:, answers.start :],
        answers.mask_BT[:, answers.start :],
        answers.ended_B,
        answers.texts,
        strict=True,
    ):
        kept = ids_T[mask_T.bool()].tolist()
        assert (tokenizer.eos_token_id in kept) == bool(ended)
        assert tokenizer.eos_token_id not in kept[:-1] and (ended or len(kept) == 30)
        assert text == tokenizer.decode(kept, skip_special_tokens=True)


def test_kl_is_zero_from_itself_and_agrees_with_the_log_ratio(folder: Path, tmp_path: Path) -> None:
    """The mean over many answers of log policy - log reference is the same KL, with more noise."""
    policy, tokenizer = load_language_model(str(folder), CPU)
    reference, _ = load_language_model(str(save_policy(tmp_path / "other", seed=1)), CPU)
    answers = sample_answers(policy, tokenizer, PROMPTS * 100, 0, 5, temperature=0.5)
    assert kl_from(policy, policy, answers, 0.5).abs().max() < 1e-5
    near, _ = load_language_model(str(folder), CPU)
    with torch.no_grad():
        near.lm_head.weight *= 1 + 1e-6
    assert 0 <= kl_from(near, policy, answers, 0.5).min() < 1e-5
    kl_B = kl_from(reference, policy, answers, 0.5)
    ratio_B = sum(
        sign * _log_likelihood(model, answers, 0.5) for sign, model in ((1, policy), (-1, reference))
    )
    assert (kl_B >= 0).all() and kl_B.std() < ratio_B.std()
    assert kl_B.mean().item() == pytest.approx(ratio_B.mean().item(), abs=4 * ratio_B.std().item() / 300**0.5)


def _log_likelihood(model: Any, answers: Any, temperature: float) -> Any:
    """Sum of log odds of each answer's tokens, row by row and without any padding."""
    found = []
    for ids_T, mask_T in zip(answers.ids_BT, answers.mask_BT, strict=True):
        kept, answer = ids_T[mask_T.bool()], int(mask_T[answers.start :].sum())
        with torch.no_grad():
            odds_TV = (model(kept[None]).logits[0, :-1] / temperature).log_softmax(-1)
        found.append(odds_TV.gather(1, kept[1:, None])[-answer:].sum())
    return torch.stack(found)


def test_a_texts_end_joins_its_prompt_as_the_policy_wrote_it() -> None:
    words = tiny_tokenizer()
    ids = words("w3 w4")["input_ids"] + [words.eos_token_id]
    assert answer_text(words, "w1 w2", ids) == " w3 w4"
    assert answer_text(words, "w1 w2 ", ids) == "w3 w4"
    assert answer_text(words, [{"role": "user", "content": "w1"}], ids) == "w3 w4"
    metaspace = _metaspace_tokenizer()
    ids = metaspace("one two")["input_ids"]
    assert metaspace.decode(ids) == "one two"
    assert answer_text(metaspace, "two one", ids) == " one two"


def _metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens begin with the space before them, as Llama 2's do."""
    core = Tokenizer(models.WordLevel({"\u2581one": 0, "\u2581two": 1, "<unk>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_prompts_are_left_open(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "w1"}]
    with pytest.raises(DataError, match="without a chat template"):
        prompt_ids(tiny_tokenizer(), [chat])
    _, tokenizer = load_language_model(str(save_policy(tmp_path / "chat", chat=True)), CPU)
    assert tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, [chat])[0]) == ["<unk>", "w1", "w9"]
    ending = tiny_tokenizer()
    ending.eos_token = "w7"
    with pytest.raises(UnsupportedError, match="ends every prompt"):
        prompt_ids(ending, ["w1 w7"])
    with pytest.raises(DataError, match="empty prompt"):
        prompt_ids(tiny_tokenizer(), ["  "])


def test_a_reward_model_is_no_policy_and_tied_heads_are_no_fault(tmp_path: Path) -> None:
    tied, _ = load_language_model(str(save_policy(tmp_path / "tied", tie_word_embeddings=True)), CPU)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    with pytest.raises(CheckpointError, match="is not a language model"):
        load_language_model(str(save_dense(tmp_path / "dense")), CPU)


def test_samples_can_be_evaluated(folder: Path, tmp_path: Path) -> None:
    liked = str(save_last_word_model(tmp_path / "liked", "w5"))
    drawn = sample(
        model=str(folder),
        prompts=write_prompts(tmp_path / "p.jsonl", 5),
        per_prompt=8,
        max_new_tokens=5,
        output=tmp_path / "drawn",
        batch_tokens=64,
        gold_model=liked,
    )
    source = str(drawn / "candidates.jsonl.gz")
    sets, _ = read_candidates(source, TextFormat())
    items = [(one.prompt, text) for one in sets for text in one.texts]
    gold = np.array([score for one in sets for score in one.gold])
    assert len(sets) == 5 and gold == pytest.approx(model_reward(liked, CPU, 64)(items), abs=1e-5)
    results = read_manifest(drawn)["results"]
    assert results["answers"] == len(gold) and results["answers"] + results["left_out"]["answers"] == 40
    out = evaluate(models={"m": liked}, candidates={"c": source}, resamples=100, output=tmp_path / "e")
    found = json.loads((out / "report.json").read_text())["probes"]["best_of_n"]["sets"]["c"]
    assert found["models"]["m"]["gold"] == pytest.approx(found["references"]["best possible"], abs=1e-5)


def test_chats_are_answered_by_messages(tmp_path: Path) -> None:
    drawn = sample(
        model=str(save_policy(tmp_path / "chat", chat=True)),
        prompts=write_prompts(tmp_path / "p.jsonl", 2, chat=True),
        per_prompt=3,
        max_new_tokens=4,
        output=tmp_path / "drawn",
        gold_function=lambda prompt, answer: len(answer[0]["content"].split()),
    )
    first = read(drawn)[0]
    assert first.prompt == [{"role": "user", "content": "w0 w0"}]
    assert first.texts[0][0]["role"] == "assistant" and 1 <= first.gold[0] <= 4


def test_a_killed_run_goes_on_to_the_same_answers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "model": str(folder),
        "prompts": write_prompts(tmp_path / "p.jsonl", 4),
        "per_prompt": 6,
        "max_new_tokens": 6,
        "batch_tokens": 40,
        "seed": 3,
    }
    whole = read(sample(**given, output=tmp_path / "whole"))
    drawn: list[int] = []
    real = policies.sample_answers

    def dies(*args: Any) -> Any:
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sys.modules["moemerge.stages.sample"], "sample_answers", dies)
    with pytest.raises(KeyboardInterrupt):
        sample(**given, output=tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    again = read(sample(**given, output=tmp_path / "killed"))
    assert again == whole and len(drawn) == 3 + 5 - 2
    assert {len(one.texts) for one in whole} <= {4, 5, 6}
    assert read(sample(**{**given, "seed": 4}, output=tmp_path / "other")) != whole


def test_rows_that_are_no_prompts(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text(
        '{"prompt": "w1"}\n{"prompt": "w2"}\n{"prompt": "w1"}\n{"prompt": " "}\n{"text": "w1"}\n'
    )
    prompts, report = read_prompts(str(source), TextFormat(bad_rows="skip"))
    assert [one.row for one in prompts] == [1, 2, 3] and distinct(prompts) == prompts[:2]
    assert report.reasons == {"empty prompt": [4], "missing prompt": [5]}
    given: dict[str, Any] = {"model": str(folder), "prompts": str(source), "output": tmp_path / "drawn"}
    with pytest.raises(DataError, match="empty prompt"):
        sample(**given, max_new_tokens=4)
    with pytest.raises(DataError, match="(?s)longer than 0 tokens.*raise max_length"):
        sample(**given, max_new_tokens=16, max_length=16, bad_rows="skip")
    source.write_text('{"prompt": "w1"}\n{"prompt": [{"role": "user", "content": "w1"}]}\n')
    with pytest.raises(DataError, match="of different kinds"):
        sample(**given, max_new_tokens=4)
