"""TRL's RewardTrainer as `moemerge train` uses it: rates by role, exact evaluation, small checkpoints.

Checkpoints live in the run's own workspace and are read back by torch.load(weights_only=True) and safetensors
only; nothing else is ever unpickled.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from trl.trainer.reward_trainer import RewardTrainer

from moemerge.artifacts.disk import flush, flush_tree, write_whole
from moemerge.artifacts.ranks import leads
from moemerge.data.tokenise import EncodedCandidates, EncodedPair, require_prompts, texts_of
from moemerge.errors import CheckpointError, OptionError
from moemerge.models import processes
from moemerge.models.moe import FREE, moe_layers
from moemerge.models.pooling import safe_pad, set_pad
from moemerge.models.scoring import bradley_terry, gates_by_prompt, score_pairs
from moemerge.options.train import Train
from moemerge.training.arguments import curves_of, keep_curves, reward_arguments
from moemerge.training.callbacks import Pooling, Telling
from moemerge.training.expert_schedule import ExpertSchedule, assign_experts
from moemerge.training.lookahead import Lookahead
from moemerge.training.losses.base import Course
from moemerge.training.losses.mixture import Mixture, head_with_prior
from moemerge.training.pair_columns import PairCollator, pair_columns
from moemerge.training.parts import load_moments, load_trained, save_moments, save_parts
from moemerge.training.rounded_adamw import RoundedAdamW

STATE = "trainer_state.json"
SCHEDULER = "scheduler.pt"
WHOLE = "whole"
EVAL_TOKENS = 8192

log = logging.getLogger(__name__)


class PairTrainer(RewardTrainer):
    """A RewardTrainer that logs the balance loss and evaluates on all held-out pairs, each counted once.

    `groups` are AdamW parameter groups; `held_out` the pairs that `measure` and `evaluate` score; `schedule`,
    if any, steers the gates of each training step. `mixture`, if any, is minimised in place of TRL's loss;
    `lookahead`, if any, says where gradients are taken. Its checkpoints hold the weights that train, and no
    others. It sends no telemetry and writes no model card.
    """

    model: Any
    processing_class: Any

    def __init__(
        self,
        *,
        groups: list[dict[str, Any]],
        held_out: Sequence[EncodedPair],
        schedule: ExpertSchedule | None = None,
        **trl: Any,
    ) -> None:
        sharded = processes.is_sharded(trl["model"])
        # transformers does not save the moments of sharded models, and so refuses; we save them.
        trl["args"].save_only_model = sharded
        super().__init__(**trl)
        self.args.save_only_model = False
        self.groups, self.held_out, self.schedule = groups, held_out, schedule
        self.mixture: Mixture | None = None
        self.lookahead: Lookahead | None = None
        self.compared = False
        self.moe = list(moe_layers(self.model).values())
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the given groups, or what TRL's key optim names."""
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            narrow = any(w.dtype == torch.bfloat16 for group in self.groups for w in group["params"])
            if narrow and kind is torch.optim.AdamW:
                kind, settings = RoundedAdamW, {"seed": self.args.seed, **settings}
            elif narrow:
                log.warning(
                    "%s rounds bfloat16 weights to the nearest: small updates are lost", kind.__name__
                )
            self.optimizer = kind(self.groups, **settings)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """One forward and backward pass; the balance loss is a mean over layers and an update's passes."""
        if self.schedule is None:
            return self._step(model, inputs, *args, **kwargs)
        context, places_P = self.moe[0].context, inputs["places"].to(self.model.device)
        context.steering = self.schedule.at(self.state.global_step, places_P)
        try:
            return self._step(model, inputs, *args, **kwargs)
        finally:
            context.steering = FREE

    def _step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        first = self.state.global_step == 0 and not self.compared
        # Gradients of weights in parts exist in backward passes only.
        if self.mixture is not None and first and not processes.is_sharded(self.model):
            self._compare_gradients(self._prepare_inputs(inputs))
        with self._looking_ahead():
            # Each pass sends its own balance loss into the gradients, which add up over layers and passes.
            for layer in self.moe:
                layer.balance_scale = 1 / (len(self.moe) * self.current_gradient_accumulation_steps)
            return super().training_step(model, inputs, *args, **kwargs)

    @contextmanager
    def _looking_ahead(self) -> Iterator[None]:
        """While open, the weights are the lookahead's, if there is one."""
        if self.lookahead is None:
            yield
            return
        self.model.train()
        with self._unsteered(), self.compute_loss_context_manager():
            difference = self.lookahead.difference(self.state.global_step)
            step = self.lookahead.step(difference)
        self._metrics["train"]["lookahead_difference"].append(difference.item())
        with self.lookahead.moved(step):
            yield

    @contextmanager
    def _unsteered(self) -> Iterator[None]:
        """While open, gates are as the model has them, and nothing sends the balance loss along."""
        contexts = [layer.context for layer in self.moe]
        before = [context.steering for context in contexts]
        for layer in self.moe:
            layer.balance_scale, layer.context.steering = 0.0, FREE
        try:
            yield
        finally:
            for context, steering in zip(contexts, before, strict=True):
                context.steering = steering

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's Bradley-Terry loss, or the mixture; terms and the mean balance loss are kept for the log."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        places_P = inputs.pop("places", None)
        if self.mixture is None:
            result = super().compute_loss(model, inputs, *args, **kwargs)
            metrics.pop("num_tokens", None)  # TRL's counter forgets the steps before a resume
        else:
            batch = self.mixture.answer(model, inputs, places_P, self.state.global_step)
            terms = self.mixture.terms(batch)
            for name, term in terms.items():
                metrics[f"{name}_loss"].append(self._mean(term))
            metrics["accuracy"].append(self._mean((batch.differences_B > 0).float().mean()))
            result = self.mixture.total(terms)
        balance = [layer.last_balance.float() for layer in self.moe if layer.last_balance is not None]
        if balance:
            metrics["balance_loss"].append(self._mean(torch.stack(balance).mean()))
        return result

    def _mean(self, value: torch.Tensor) -> float:
        """The mean over processes, each of which has as many pairs."""
        gathered: torch.Tensor = self.accelerator.gather(value.detach())
        return gathered.mean().item()

    def _compare_gradients(self, inputs: dict[str, Any]) -> None:
        """Log how strongly each term pulls at the trunk in the first batch; training goes on as without.

        Of several processes each looks at its own part, and the first one's is logged.
        """
        assert self.mixture is not None
        model = self.model  # not what wraps it, which counts on a backward pass after each forward
        for layer in self.moe:
            layer.balance_scale = 0.0  # else every term's gradient would hold the balance loss's
        model.train()
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            places_P = inputs.pop("places")
            ratios = self.mixture.gradient_ratios(self.mixture.answer(model, inputs, places_P, 0))
        self.compared = True
        for name, ratio in ratios.items():
            self._metrics["train"][f"{name}_gradient_ratio"].append(ratio)

    def measure(self) -> dict[str, float]:
        """Bradley-Terry loss in nats (infinite if scores are not finite) and accuracy on held-out pairs."""
        self.model.eval()
        try:
            with self.accelerator.autocast():
                scores_P2 = score_pairs(self.model, self.processing_class, self.held_out, EVAL_TOKENS)
        except CheckpointError:
            return {"loss": math.inf, "accuracy": 0.0}
        loss, accuracy = bradley_terry(scores_P2)
        return {"loss": loss, "accuracy": accuracy}

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure, log and call the callbacks: TRL's own averages count a ragged last batch too much."""
        metrics = {f"eval_{name}": value for name, value in self.measure().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: training checkpoints are no models to publish."""

    def _send_telemetry(self) -> None:
        pass

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if leads() or processes.is_sharded(self.model):
            save_parts(folder, {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As ever; of a sharded model each process keeps its part of the moments."""
        if not processes.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_moments(self.optimizer, Path(output_dir))
        if leads():
            torch.save(cast("Any", self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not processes.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_moments(self.optimizer, Path(checkpoint))
        state = torch.load(Path(checkpoint) / SCHEDULER, map_location="cpu", weights_only=True)
        cast("Any", self.lr_scheduler).load_state_dict(state)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As ever; then the checkpoint is flushed, and only then marked as whole.

        Each of several processes adds its random state; the first one marks what all have written.
        """
        super()._save_checkpoint(*args, **kwargs)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        processes.wait()
        if leads():
            flush_tree(folder)
            (folder / WHOLE).touch()
            flush(folder)
        processes.wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.model, Path(resume_from_checkpoint))


def make_trainer(
    options: Train,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    roles: dict[str, str],
    pairs: Sequence[EncodedPair],
    held_out: Sequence[EncodedPair],
    folder: Path,
    candidates: Sequence[EncodedCandidates] = (),
) -> PairTrainer:
    """A trainer of the parameters in `roles` (name -> role) whose checkpoints go to `folder`, our own.

    Raises OptionError for options of experts that the model lacks, DataError for pairs without prompts if
    its gates look at prompts.
    """
    if gated := gates_by_prompt(model):
        require_prompts(pairs)
    schedule = expert_schedule(options, model, pairs)
    answers = [answer for sets in candidates for answer in sets.answers]
    pad = safe_pad(model.config, [*texts_of([*pairs, *held_out]), *answers])
    mixed = is_mixed(options, model)
    trainer = PairTrainer(
        model=model,
        args=reward_arguments(options, model.device, len(pairs), bool(held_out), folder),
        data_collator=PairCollator(pad_token_id=pad),
        train_dataset=pair_columns(
            pairs,
            prompts=gated or mixed,
            places=schedule is not None or mixed,
            margins=options.margin == "column" and not mixed,
        ),
        eval_dataset=pair_columns(held_out, gated) if held_out else None,
        processing_class=_with_a_pad_token(tokenizer),
        groups=_groups(options, model, roles),
        held_out=held_out,
        schedule=schedule,
    )
    trainer.add_callback(Pooling(pad))
    trainer.add_callback(Telling())
    keep_curves(trainer, curves_of(options, folder.name))
    set_pad(model.config, pad)  # for what is measured before training
    if mixed:
        trainer.mixture = Mixture(Course(options, model, pairs, pad, folder, trainer.accelerator.autocast))
    if candidates:
        rate, num_sets = options.lookahead_rate, options.lookahead_sets
        trainer.lookahead = Lookahead(model, candidates, pad, rate, num_sets, options.seed)
    return trainer


def is_mixed(options: Train, model: PreTrainedModel) -> bool:
    """Whether anything but TRL's own Bradley-Terry loss, with margins or without, is to be minimised."""
    prior = options.head_kl and head_with_prior(model) is not None
    plain = options.minimised == {"bradley_terry": 1.0}
    return bool(not plain or options.label_smoothing or options.center or prior)


def _with_a_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that TRL takes: it wants a pad token, or an end token, and gives the tokenizer that."""
    copy = deepcopy(tokenizer)
    if copy.pad_token is None:
        copy.pad_token = copy.eos_token or copy.convert_ids_to_tokens(0)
    return copy


def expert_schedule(
    options: Train, model: PreTrainedModel, pairs: Sequence[EncodedPair]
) -> ExpertSchedule | None:
    """How `options` steer the gates of `model`, or None if they do not. Raises OptionError if they cannot."""
    steered, layers = options.steered(), list(moe_layers(model).values())
    shared = any(layer.shared_expert is not None for layer in layers)
    if not steered:
        return None
    if not layers or ("shared_dropout" in steered and not shared):
        raise OptionError(
            "the model lacks the experts that training is to steer",
            given=f"{', '.join(steered)}; {'no shared expert' if layers else 'a dense model'}",
            expected="a MoE, for shared_dropout one with a shared expert",
            fix="leave these options out here, or train a MoE that upcycle made",
        )
    subsets = [pair.pair.subset for pair in pairs]
    experts = assign_experts(options, subsets, layers[0].settings.num_routed_experts)
    return ExpertSchedule(options, options.total_steps(len(pairs)), experts)


def _groups(options: Train, model: PreTrainedModel, roles: dict[str, str]) -> list[dict[str, Any]]:
    """AdamW's parameter groups: a rate per role, weight decay on matrices only."""
    rates = {
        "rest": options.learning_rate,
        "experts": options.expert_learning_rate or options.learning_rate,
        "routers": options.router_learning_rate or options.learning_rate,
        "head": options.head_learning_rate or options.learning_rate,
    }
    groups = []
    for (role, rate), decays in itertools.product(rates.items(), (True, False)):
        names = [name for name in roles if roles[name] == role and _decays(name) == decays]
        if names:
            weights = [model.get_parameter(name) for name in names]
            decay = options.weight_decay if decays else 0.0
            groups.append({"params": weights, "lr": rate, "weight_decay": decay, "role": role})
    return groups


def _decays(name: str) -> bool:
    """Whether weight decay is for this parameter: not for biases and norms."""
    return not (name.endswith("bias") or "norm" in name.lower())


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete trainer checkpoint in `folder`, or None; incomplete ones are removed.

    A complete one bears a mark that was written when all else was on the disk. Its path of the best
    checkpoint is renewed in case the folder was moved. All of several processes come here together: the first
    one clears up before the others look.
    """
    found = _newest(folder) if leads() else None
    processes.wait()
    return found if leads() else _newest(folder)


def _newest(folder: Path) -> Path | None:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in checkpoints if (path / WHOLE).exists()]
    for path in set(checkpoints) - set(whole) if leads() else ():
        shutil.rmtree(path)
    if not whole:
        return None
    state = read_state(whole[-1])
    if state["best_model_checkpoint"] and leads():
        state["best_model_checkpoint"] = str(folder.resolve() / Path(state["best_model_checkpoint"]).name)
        write_whole(whole[-1] / STATE, json.dumps(state))
    return whole[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state as saved in `checkpoint`."""
    return dict(json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
