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
from moemerge.training.policy import answer_text, prompt_ids


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


def optimise_policy(
    options: Optimise,
    name: str,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    reward: Callable[[Sequence[Item]], Floats],
    visit: Callable[[int], None],
    folder: Path,
) -> None:
    """Train `policy` in place for `options.steps` towards `reward`, calling `visit` at every measurement.

    Answers are drawn at `temperature` from all tokens. Each answer's baseline is the mean reward of the other
    answers to its prompt. Nothing is saved; TRL wants `folder` for an output folder. `name`: the reward
    model's, for trackers.
    """

    def rewards(prompts: list[Text], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        pairs = zip(prompts, completion_ids, strict=True)
        items = [(p, as_answer(p, answer_text(tokenizer, p, ids))) for p, ids in pairs]
        return list(reward(items).tolist())

    trainer = PolicyTrainer(
        model=policy,
        reward_funcs=rewards,
        args=_arguments(options, name, policy.device, folder),
        train_dataset=_dataset(options, prompts),
        processing_class=tokenizer,
        callbacks=[Visits(visit, options.measured_every)],
    )
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
