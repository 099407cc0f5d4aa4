"""Policy gradient as `moemerge optimise` uses it: TRL's RLOO trainer (arXiv 2402.14740)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from moemerge.artifacts.progress import hidden
from moemerge.data.pairs import as_answer
from moemerge.data.rows import Text
from moemerge.data.tokenise import Item
from moemerge.options.optimise import Optimise
from moemerge.reports.statistics import Floats
from moemerge.training.arguments import autocasts, curves_of, keep_curves, make_config
from moemerge.training.policy import answer_text, prompt_ids, token_ends


class PolicyTrainer(RLOOTrainer):
    """An RLOOTrainer that encodes text as sampling does, sends no telemetry and writes no model card."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: the policy is a means here."""

    def _send_telemetry(self) -> None:
        pass

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        # TRL gives text that was rendered beforehand a second BOS.
        if isinstance(prompts[0], str):
            return prompt_ids(cast(PreTrainedTokenizerBase, self.processing_class), prompts), None, {}
        return super()._tokenize_prompts(prompts)


class TokenCreditTrainer(PolicyTrainer):
    """A PolicyTrainer whose tokens have baselines of their own: what the answer had earned before each.

    A token's advantage is that of its answer, minus `weight` times the sum of `rewards` of the tokens before
    it. As that sum depends on nothing that comes later, the expected gradient is the answer's, whatever the
    weight (Williams 1992, doi 10.1007/BF00992696): rewards of tokens that telescope, as RED's do
    (arXiv 2411.08302), move no optimum, only the variance. `rewards` are those of the answers scored last.
    """

    weight: float
    rewards: Sequence[Floats]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        mask_BT = output["completion_mask"]
        earned_BT = torch.zeros(mask_BT.shape, dtype=torch.float64)
        for row, rewards_T in zip(earned_BT, self.rewards, strict=True):
            row[1 : len(rewards_T)] = torch.from_numpy(rewards_T[:-1]).cumsum(0)
        return output | {"baselines": (self.weight * earned_BT).to(mask_BT.device, torch.float32)}

    def _get_per_token_logps_and_entropies(self, *args: Any, **how: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **how)
        self._logps_BT = found[0]
        return found

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        # Answers are the policy's own, so RLOO's ratio is 1 and its gradient that of advantage * log p.
        taken_BT = (
            inputs["baselines"] * inputs["completion_mask"] * (self._logps_BT - self._logps_BT.detach())
        )
        return loss + taken_BT.sum(dim=1).mean()


class Visits(TrainerCallback):
    """Calls `visit(step)` after every `every` steps and after the last one, with the policy in eval mode."""

    def __init__(self, visit: Callable[[int], None], every: int) -> None:
        self.visit, self.every = visit, every

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure if it is time to."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        model.eval()
        self.visit(state.global_step)
        model.train()


class AfterSteps(Visits):
    """The same, called before what is measured; Trainer warns of two callbacks of one class."""


def optimise_policy(
    options: Optimise,
    name: str,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    reward: Callable[[Sequence[Item]], Floats],
    credit: Callable[[Sequence[Item], Sequence[Sequence[int]]], tuple[Floats, list[Floats]]] | None,
    visit: Callable[[int], None],
    folder: Path,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train `policy` in place for `options.steps` towards `reward`, calling `visit` at every measurement.

    Answers are drawn at `temperature` from all tokens. Each answer's baseline is the mean reward of the other
    answers to its prompt. `credit`, if given, gives each answer's reward in place of `reward`, and what each
    of its tokens, by their ends in its text, has added to it: see TokenCreditTrainer. `after_step` is called
    after each step, before it is measured. Nothing is saved; TRL wants `folder` for an output folder.
    `name`: the reward model's, for trackers.
    """

    def rewards(prompts: list[Text], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        pairs = zip(prompts, completion_ids, strict=True)
        items = [(p, as_answer(p, answer_text(tokenizer, p, ids))) for p, ids in pairs]
        if credit is None:
            return list(reward(items).tolist())
        ends = [token_ends(tokenizer, p, ids) for p, ids in zip(prompts, completion_ids, strict=True)]
        scores, trainer.rewards = credit(items, ends)
        return list(scores.tolist())

    trainer: Any = (PolicyTrainer if credit is None else TokenCreditTrainer)(
        model=policy,
        reward_funcs=rewards,
        args=_arguments(options, name, policy.device, folder),
        train_dataset=_dataset(options, prompts),
        processing_class=tokenizer,
        callbacks=[
            *([AfterSteps(after_step, 1)] if after_step else []),
            Visits(visit, options.measured_every),
        ],
    )
    trainer.weight = options.credit_weight
    trainer.remove_callback(PrinterCallback)
    keep_curves(trainer, curves_of(options, name))
    trainer.train()


def _dataset(options: Optimise, prompts: Sequence[Text]) -> Dataset:
    """The prompts, repeated if they are too few for a step, because TRL draws without replacement."""
    wanted = options.batch_size * options.gradient_accumulation // options.answers_per_prompt
    rows = list(prompts) * math.ceil(wanted / len(prompts))
    return Dataset.from_dict({"prompt": rows})


def _arguments(options: Optimise, name: str, device: torch.device, folder: Path) -> RLOOConfig:
    return make_config(
        RLOOConfig,
        {
            "output_dir": str(folder.resolve()),
            "seed": options.seed,
            "max_steps": options.steps,
            "per_device_train_batch_size": options.batch_size,
            "gradient_accumulation_steps": options.gradient_accumulation,
            "num_generations": options.answers_per_prompt,
            "max_completion_length": options.max_new_tokens,
            "temperature": options.temperature,
            "beta": options.kl_penalty,
            "learning_rate": options.learning_rate,
            "lr_scheduler_type": "constant",
            "max_grad_norm": options.max_grad_norm,
            "bf16": autocasts(options.precision, device),
            "use_cpu": device.type == "cpu",
            "gradient_checkpointing": options.gradient_checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "disable_dropout": True,
            "report_to": options.report_to or "none",
            "run_name": f"{options.output.name}/{name}",
            "disable_tqdm": hidden(),
            "save_strategy": "no",
            "logging_strategy": "steps" if options.report_to else "no",
            "logging_steps": 1,
        },
    )
