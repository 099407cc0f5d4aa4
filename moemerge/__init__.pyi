"""Upcycle a reward model into a mixture of experts, train it, and merge it back."""

# Made from the options: `make stub` writes it anew. Do not edit.

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from moemerge.artifacts.result import Result as Result
from moemerge.artifacts.verify import verify as verify
from moemerge.artifacts.verify import verify_folder as verify_folder
from moemerge.errors import ArtifactError as ArtifactError
from moemerge.errors import CheckpointError as CheckpointError
from moemerge.errors import DataError as DataError
from moemerge.errors import Faults as Faults
from moemerge.errors import MoemergeError as MoemergeError
from moemerge.errors import OptionError as OptionError
from moemerge.errors import UnsupportedError as UnsupportedError
from moemerge.evaluation.token_rewards import TokenRewards as TokenRewards
from moemerge.evaluation.token_rewards import token_rewards as token_rewards
from moemerge.merging.coefficients import Coefficients as Coefficients
from moemerge.models import modelling as modelling
from moemerge.models.modelling import load_moe as load_moe
from moemerge.models.routing import RoutingStatistics as RoutingStatistics
from moemerge.run.check import check_recipe as check_recipe
from moemerge.run.check import load_recipe as load_recipe
from moemerge.run.forecast import forecast as forecast
from moemerge.run.pipeline import run_recipe as run_recipe
from moemerge.run.steps import RunReport as RunReport
from moemerge.run.steps import StepReport as StepReport
from moemerge.run.steps import open_result as open_result

StrPath: TypeAlias = str | os.PathLike[str]

__version__: str

def strength(
    pairs: StrPath,
    *,
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    head: str | None = None,
    head_width: int = 1024,
    head_dropout: float = 0.1,
    head_noise: bool | None = None,
    head_start: Literal["positive", "uniform"] = "positive",
    head_seed: int | None = None,
    head_kl: float = 1e-05,
    head_learning_rate: float | None = None,
    epochs: float = 1.0,
    max_steps: int | None = None,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    learning_rate: float = 1e-05,
    expert_learning_rate: float | None = None,
    router_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    warmup: float = 0.03,
    schedule: Literal["linear", "cosine", "constant"] = "linear",
    max_grad_norm: float = 1.0,
    trainable: Literal["full", "experts", "lora"] = "full",
    train_layers: str = "all",
    lora_rank: int = 16,
    lora_alpha: float = 32.0,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    weights: Literal["float32", "bfloat16"] = "float32",
    gradient_checkpointing: bool = False,
    group_by_length: bool = False,
    eval_steps: int | None = None,
    patience: int | None = 3,
    choose_by: Literal["loss", "accuracy"] = "loss",
    shared_dropout: float = 0.0,
    router_temperature: float = 1.0,
    temperature_share: float = 0.5,
    top1_warmup: float = 0.0,
    assign: Literal["router", "subset", "shards"] = "router",
    assign_share: float = 0.5,
    assign_order: Sequence[str] = [],
    objectives: Mapping[str, float] = {"bradley_terry": 1.0},
    label_smoothing: float | Literal["column"] = 0.0,
    margin: Literal["none", "column"] = "none",
    center: float = 0.0,
    language_head: StrPath | None = None,
    policy_temperature: float = 0.1,
    language_form: Literal["mean", "sigmoid"] = "mean",
    contrast_temperature: float = 0.05,
    contrast_dropout: float = 0.1,
    lookahead: StrPath | None = None,
    lookahead_rate: float = 0.01,
    lookahead_sets: int = 4,
    fresh_head: bool = False,
    search: Mapping[str, Sequence[float]] = {},
    sharded: bool = False,
    trainer: Mapping[str, Any] = {},
    folds: int = 5,
    orders: int = 3,
    fold_by: Literal["text", "prompt", "subset"] = "text",
    planted: float = 0.05,
    trusted: StrPath | None = None,
    noise: float | None = None,
    treat: Literal["none", "auto", "flip", "drop", "soft"] = "none",
    auto_by: Literal["flip", "drop"] = "flip",
    share: float = 0.2,
    confidence: float = 0.95,
    batch_tokens: int = 8192,
    voters: Sequence[StrPath] = [],
    votes: StrPath | None = None,
    model: StrPath | None = None,
    validation: StrPath | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write the pairs with strength, spread and margin, treated as asked, and what the vote is worth.

    Voters are trained here, F folds x `orders`, none on a prompt that it scores; or are models that are
    given; or their votes are those of an earlier output. Writes pairs.jsonl.gz (to train on: `margin` is the
    strength, `doubt` there with treat soft), votes.jsonl.gz and trusted.jsonl.gz (what each voter said),
    strength.json, report.html, report.md and plots. A killed run goes on with the voter that it was at.
    Several processes train each voter together (DDP), and share the texts that it scores. A flipped label's
    strength and margin have the sign of the new label. Raises OptionError, DataError, CheckpointError,
    UnsupportedError or ArtifactError.

    Options:
        pairs: preference pairs whose labels are voted on  [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        head: draw a new reward head, in place of an existing one: linear, the stock one; mlp, two
            layers and a weighted sum; nonnegative, BNRM's, whose factors and weights are never below 0
            and are drawn in training. Models with one of the last two need moemerge to be loaded
        head_width: mlp, nonnegative: width of their layers  [default: 1024]
        head_dropout: mlp, nonnegative: dropout on the last state  [default: 0.1]
        head_noise: mlp, nonnegative: Weibull noise on factors and weights in training (default:
            nonnegative yes, mlp no)
        head_start: nonnegative: initial weights; positive: all above 0; uniform: the paper's, where
            half are 0 for ever (positive, uniform)  [default: positive]
        head_seed: seed that the new head is drawn from (default: seed); models whose heads were drawn
            alike can be averaged whole
        head_kl: nonnegative head with noise: weight of the KL divergence from its prior  [default:
            1e-05]
        head_learning_rate: learning rate of the reward head (default: learning_rate)
        epochs: passes over the training pairs  [default: 1.0]
        max_steps: optimiser steps; overrides epochs
        batch_size: pairs per step; several processes share them  [default: 8]
        gradient_accumulation: batches per optimiser step  [default: 1]
        learning_rate: learning rate of everything that has no rate of its own  [default: 1e-05]
        expert_learning_rate: learning rate of experts, the shared one too, or of a dense model's MLPs
            (default: learning_rate)
        router_learning_rate: learning rate of routers (default: learning_rate)
        weight_decay: AdamW weight decay  [default: 0.0]
        warmup: share of steps with rising learning rate  [default: 0.03]
        schedule: learning rate after warm-up (linear, cosine, constant)  [default: linear]
        max_grad_norm: gradient clipping  [default: 1.0]
        trainable: full; experts: experts, routers and head; lora: those plus LoRA on attention (full,
            experts, lora)  [default: full]
        train_layers: transformer layers that train; the head always does  [default: all]
        lora_rank: rank of LoRA on attention  [default: 16]
        lora_alpha: scale of LoRA on attention  [default: 32.0]
        precision: auto: bfloat16 autocast on a GPU, float32 on CPU (auto, float32, bfloat16)  [default:
            auto]
        weights: type of weights and gradients, also as saved; bfloat16: 12 bytes a weight in place of
            16; moments are float32, and updates are rounded at random, so that small ones are not lost
            (float32, bfloat16)  [default: float32]
        gradient_checkpointing: less memory, about a third more time  [default: no]
        group_by_length: batches of similar length: faster where lengths vary, but a less random order
            [default: no]
        eval_steps: steps between evaluations (default: ten per run)
        patience: evaluations without improvement before stopping; none: never  [default: 3]
        choose_by: criterion on validation pairs for choosing steps and trials; loss depends on how
            confident the scores are, accuracy only on their order (and takes the first of equals)
            (loss, accuracy)  [default: loss]
        shared_dropout: probability that a pair is scored without the shared expert, in all layers
            [default: 0.0]
        router_temperature: divides the router's logits at the first step, then falls or rises to 1
            [default: 1.0]
        temperature_share: share of steps until the router's temperature is 1  [default: 0.5]
        top1_warmup: share of steps with one routed expert per token, at the start  [default: 0.0]
        assign: what picks a pair's routed expert at the start: the router, its subset, or a random
            shard (router, subset, shards)  [default: router]
        assign_share: share of steps with experts by subset or shard  [default: 0.5]
        assign_order: subsets of expert 0, 1, ..., and round again (default: all, by name)
        objectives: what training minimises, with weights (0: left out): bradley_terry, on labels;
            policy, DPO on the same pairs by a language head on the trunk; language, likely chosen
            answers by it; contrast, which tells the pairs of a batch apart by their states' differences
            [default: bradley_terry=1.0]
        label_smoothing: bradley_terry: label smoothing, the share of labels assumed to be wrong, below
            0.5; column: each pair's own, from the data's column doubt (column)  [default: 0.0]
        margin: bradley_terry: margin that chosen must win by: the data's margin column (none, column)
            [default: none]
        center: weight of mean (chosen score + rejected score)^2, which keeps scores near 0  [default:
            0.0]
        language_head: policy and language: the language model that the reward model was made from,
            whose head is used, frozen (default: the model's own head, or its embeddings where the
            architecture ties them)
        policy_temperature: policy: factor on log-odds; language_form sigmoid: on the log-probability
            [default: 0.1]
        language_form: language: -log pi per token of the chosen answer; sigmoid: GRM's, -log sigmoid of
            policy_temperature times their sum (mean, sigmoid)  [default: mean]
        contrast_temperature: contrast: temperature that divides cosines  [default: 0.05]
        contrast_dropout: contrast: dropout on a state in each of its two views  [default: 0.1]
        lookahead: MetaRM: sets of three or more answers of the policy, whose gold is not used;
            gradients are taken where the model tells these answers further apart
        lookahead_rate: lookahead: size of its step relative to the norm of the weights  [default: 0.01]
        lookahead_sets: lookahead: sets per batch  [default: 4]
        fresh_head: draw a new reward head where the model's own is missing or under another name (a
            plain base model always gets one)  [default: no]
        search: values to try per option, e.g. learning_rate: [1e-5, 3e-5]; choose_by chooses
        sharded: several processes: each holds a part of weights, gradients and moments, and never more
            than a layer whole (FSDP2), in place of all of them (DDP)  [default: no]
        trainer: any other key of TRL's RewardConfig, e.g. report_to: tensorboard, optim: adafactor
        folds: parts of the pairs; each is scored by voters trained on the others  [default: 5]
        orders: voters per part, each trained in an order of its own  [default: 3]
        fold_by: what keeps pairs in one part: an equal prompt; text: an equal prompt or answer; subset:
            an equal subset or prompt (text, prompt, subset)  [default: text]
        planted: share of pairs whose labels are flipped for the voters: planted errors, to be found
            [default: 0.05]
        trusted: pairs like these with checked labels, to measure how often the vote errs
        noise: in place of trusted: known share of wrong labels, equal for all kinds of pairs
        treat: auto: flip or drop (auto_by) as many of each subset's weakest pairs as are surely more
            than half wrong; flip, drop: the weakest share; soft: write each label's doubt (none, auto,
            flip, drop, soft)  [default: none]
        auto_by: what treat auto does with these pairs (flip, drop)  [default: flip]
        share: flip and drop: share of pairs, the weakest ones  [default: 0.2]
        confidence: coverage of intervals  [default: 0.95]
        batch_tokens: tokens per forward pass when pairs are scored  [default: 8192]
        voters: in place of training: reward models (or scorer.json) that vote as they are and have not
            seen the pairs
        votes: in place of training: folder that strength wrote for these pairs, to treat them
            differently by the same votes
        model: what voters are trained from: a reward model, or a base model (fresh head)
        validation: held-out pairs for the voters' early stopping and search
        trust_remote_code: run code that comes with the models  [default: no]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def upcycle(
    model: StrPath,
    *,
    output: StrPath,
    num_routed_experts: int = 7,
    num_experts_per_tok: int = 5,
    shared_expert: bool = True,
    layers: str = "all",
    gate: Literal["xft", "topk", "prompt"] = "xft",
    gate_shared_weight: float = 0.5,
    router: Literal["linear", "mlp"] = "linear",
    router_init: Literal["normal", "zero"] = "normal",
    router_init_std: float = 0.02,
    expert_noise: float = 0.0,
    balance_coefficient: float = 0.01,
    balance_loss: Literal["cv", "switch"] = "cv",
    fresh_head: bool = False,
    shard_size: int = 5000000000,
    trust_remote_code: bool = False,
    experts: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = {},
    heads: Literal["shared", "by_expert"] = "shared",
    calibration: StrPath | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write the MoE of `options.model`, and check on a probe batch that it equals the dense model.

    A base language model or encoder, or with `fresh_head` any model that lacks its head, gets a fresh one
    drawn from `seed`. With `experts` the routed experts are these models' MLPs, and nothing is compared: the
    function is another one. Weights are read and written tensor by tensor, so no more than one shard is held.
    Raises UnsupportedError for an unknown architecture and CheckpointError for a damaged model or when the
    functions differ; UnsupportedError for experts of another architecture than the model's.

    Options:
        model: dense reward model, base LM or encoder: folder or hub name  [required]
        output: folder to write; must not exist yet  [required]
        num_routed_experts: routed experts per layer (N)  [default: 7]
        num_experts_per_tok: routed experts per token (K)  [default: 5]
        shared_expert: keep one expert that sees every token  [default: yes]
        layers: which layers: all, first:4, last:4, or 0,2,5-7  [default: all]
        gate: xft: the shared expert weighs 1 - the largest router probability, the routed ones the
            rest; topk: renormalised, beside a shared expert of fixed weight; prompt: xft, one gate per
            prompt (xft, topk, prompt)  [default: xft]
        gate_shared_weight: gate topk: weight of the shared expert  [default: 0.5]
        router: router network (linear, mlp)  [default: linear]
        router_init: initial values of the router's last layer; zero: the first K experts are picked at
            first (normal, zero)  [default: normal]
        router_init_std: standard deviation of router_init: normal  [default: 0.02]
        expert_noise: noise on the copies, in units of each matrix's standard deviation  [default: 0.0]
        balance_coefficient: weight of the balance loss, kept in the config  [default: 0.01]
        balance_loss: cv: squared variation of importance and load; switch: that of Switch Transformers
            (cv, switch)  [default: cv]
        fresh_head: draw a new reward head where the model's own is missing or under another name (a
            plain base model always gets one)  [default: no]
        shard_size: largest shard in bytes  [default: 5000000000]
        trust_remote_code: run code that comes with the model  [default: no]
        experts: two models or more of the same architecture, whose MLPs become the routed experts; a
            token takes one of them unless num_experts_per_tok says otherwise; everything else comes
            from model (default: copies of the model's own MLPs)
        heads: shared: the model's own head; by_expert, with gate prompt and experts: a text is scored
            by the head of the model whose MLPs it goes through (shared, by_expert)  [default: shared]
        calibration: with heads by_expert: folder written by calibrate; each model's head is divided by
            its scale
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def train(
    model: StrPath,
    pairs: StrPath,
    *,
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    head: str | None = None,
    head_width: int = 1024,
    head_dropout: float = 0.1,
    head_noise: bool | None = None,
    head_start: Literal["positive", "uniform"] = "positive",
    head_seed: int | None = None,
    head_kl: float = 1e-05,
    head_learning_rate: float | None = None,
    epochs: float = 1.0,
    max_steps: int | None = None,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    learning_rate: float = 1e-05,
    expert_learning_rate: float | None = None,
    router_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    warmup: float = 0.03,
    schedule: Literal["linear", "cosine", "constant"] = "linear",
    max_grad_norm: float = 1.0,
    trainable: Literal["full", "experts", "lora"] = "full",
    train_layers: str = "all",
    lora_rank: int = 16,
    lora_alpha: float = 32.0,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    weights: Literal["float32", "bfloat16"] = "float32",
    gradient_checkpointing: bool = False,
    group_by_length: bool = False,
    eval_steps: int | None = None,
    patience: int | None = 3,
    choose_by: Literal["loss", "accuracy"] = "loss",
    shared_dropout: float = 0.0,
    router_temperature: float = 1.0,
    temperature_share: float = 0.5,
    top1_warmup: float = 0.0,
    assign: Literal["router", "subset", "shards"] = "router",
    assign_share: float = 0.5,
    assign_order: Sequence[str] = [],
    objectives: Mapping[str, float] = {"bradley_terry": 1.0},
    label_smoothing: float | Literal["column"] = 0.0,
    margin: Literal["none", "column"] = "none",
    center: float = 0.0,
    language_head: StrPath | None = None,
    policy_temperature: float = 0.1,
    language_form: Literal["mean", "sigmoid"] = "mean",
    contrast_temperature: float = 0.05,
    contrast_dropout: float = 0.1,
    lookahead: StrPath | None = None,
    lookahead_rate: float = 0.01,
    lookahead_sets: int = 4,
    fresh_head: bool = False,
    search: Mapping[str, Sequence[float]] = {},
    sharded: bool = False,
    trainer: Mapping[str, Any] = {},
    more_pairs: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = {},
    shares: Mapping[str, float] = {},
    validation: StrPath | None = None,
    flops_of: Sequence[StrPath] = [],
    trust_remote_code: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Train a MoE or dense reward model, or a base model under a fresh head; write an ordinary HF folder.

    Weights train and are saved as `weights` says, moments in float32. With validation pairs the weights
    that stand best by `choose_by` are kept, which may be those of the start (best_step 0). A killed run,
    started again with equal options, goes on from its last checkpoint, and on CPU ends with the very same
    weights. Several processes share each step's pairs (DDP). Also writes history.json and history.png. Losses
    are in nats, `seconds` those since the last start.
    Raises OptionError, DataError, CheckpointError or UnsupportedError.

    Options:
        model: MoE or dense reward model, or a base model (fresh head): folder or hub name  [required]
        pairs: training pairs  [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        head: draw a new reward head, in place of an existing one: linear, the stock one; mlp, two
            layers and a weighted sum; nonnegative, BNRM's, whose factors and weights are never below 0
            and are drawn in training. Models with one of the last two need moemerge to be loaded
        head_width: mlp, nonnegative: width of their layers  [default: 1024]
        head_dropout: mlp, nonnegative: dropout on the last state  [default: 0.1]
        head_noise: mlp, nonnegative: Weibull noise on factors and weights in training (default:
            nonnegative yes, mlp no)
        head_start: nonnegative: initial weights; positive: all above 0; uniform: the paper's, where
            half are 0 for ever (positive, uniform)  [default: positive]
        head_seed: seed that the new head is drawn from (default: seed); models whose heads were drawn
            alike can be averaged whole
        head_kl: nonnegative head with noise: weight of the KL divergence from its prior  [default:
            1e-05]
        head_learning_rate: learning rate of the reward head (default: learning_rate)
        epochs: passes over the training pairs  [default: 1.0]
        max_steps: optimiser steps; overrides epochs
        batch_size: pairs per step; several processes share them  [default: 8]
        gradient_accumulation: batches per optimiser step  [default: 1]
        learning_rate: learning rate of everything that has no rate of its own  [default: 1e-05]
        expert_learning_rate: learning rate of experts, the shared one too, or of a dense model's MLPs
            (default: learning_rate)
        router_learning_rate: learning rate of routers (default: learning_rate)
        weight_decay: AdamW weight decay  [default: 0.0]
        warmup: share of steps with rising learning rate  [default: 0.03]
        schedule: learning rate after warm-up (linear, cosine, constant)  [default: linear]
        max_grad_norm: gradient clipping  [default: 1.0]
        trainable: full; experts: experts, routers and head; lora: those plus LoRA on attention (full,
            experts, lora)  [default: full]
        train_layers: transformer layers that train; the head always does  [default: all]
        lora_rank: rank of LoRA on attention  [default: 16]
        lora_alpha: scale of LoRA on attention  [default: 32.0]
        precision: auto: bfloat16 autocast on a GPU, float32 on CPU (auto, float32, bfloat16)  [default:
            auto]
        weights: type of weights and gradients, also as saved; bfloat16: 12 bytes a weight in place of
            16; moments are float32, and updates are rounded at random, so that small ones are not lost
            (float32, bfloat16)  [default: float32]
        gradient_checkpointing: less memory, about a third more time  [default: no]
        group_by_length: batches of similar length: faster where lengths vary, but a less random order
            [default: no]
        eval_steps: steps between evaluations (default: ten per run)
        patience: evaluations without improvement before stopping; none: never  [default: 3]
        choose_by: criterion on validation pairs for choosing steps and trials; loss depends on how
            confident the scores are, accuracy only on their order (and takes the first of equals)
            (loss, accuracy)  [default: loss]
        shared_dropout: probability that a pair is scored without the shared expert, in all layers
            [default: 0.0]
        router_temperature: divides the router's logits at the first step, then falls or rises to 1
            [default: 1.0]
        temperature_share: share of steps until the router's temperature is 1  [default: 0.5]
        top1_warmup: share of steps with one routed expert per token, at the start  [default: 0.0]
        assign: what picks a pair's routed expert at the start: the router, its subset, or a random
            shard (router, subset, shards)  [default: router]
        assign_share: share of steps with experts by subset or shard  [default: 0.5]
        assign_order: subsets of expert 0, 1, ..., and round again (default: all, by name)
        objectives: what training minimises, with weights (0: left out): bradley_terry, on labels;
            policy, DPO on the same pairs by a language head on the trunk; language, likely chosen
            answers by it; contrast, which tells the pairs of a batch apart by their states' differences
            [default: bradley_terry=1.0]
        label_smoothing: bradley_terry: label smoothing, the share of labels assumed to be wrong, below
            0.5; column: each pair's own, from the data's column doubt (column)  [default: 0.0]
        margin: bradley_terry: margin that chosen must win by: the data's margin column (none, column)
            [default: none]
        center: weight of mean (chosen score + rejected score)^2, which keeps scores near 0  [default:
            0.0]
        language_head: policy and language: the language model that the reward model was made from,
            whose head is used, frozen (default: the model's own head, or its embeddings where the
            architecture ties them)
        policy_temperature: policy: factor on log-odds; language_form sigmoid: on the log-probability
            [default: 0.1]
        language_form: language: -log pi per token of the chosen answer; sigmoid: GRM's, -log sigmoid of
            policy_temperature times their sum (mean, sigmoid)  [default: mean]
        contrast_temperature: contrast: temperature that divides cosines  [default: 0.05]
        contrast_dropout: contrast: dropout on a state in each of its two views  [default: 0.1]
        lookahead: MetaRM: sets of three or more answers of the policy, whose gold is not used;
            gradients are taken where the model tells these answers further apart
        lookahead_rate: lookahead: size of its step relative to the norm of the weights  [default: 0.01]
        lookahead_sets: lookahead: sets per batch  [default: 4]
        fresh_head: draw a new reward head where the model's own is missing or under another name (a
            plain base model always gets one)  [default: no]
        search: values to try per option, e.g. learning_rate: [1e-5, 3e-5]; choose_by chooses
        sharded: several processes: each holds a part of weights, gradients and moments, and never more
            than a layer whole (FSDP2), in place of all of them (DDP)  [default: no]
        trainer: any other key of TRL's RewardConfig, e.g. report_to: tensorboard, optim: adafactor
        more_pairs: further training pairs by name, such as what attack found (patch=attack/patch.jsonl)
        shares: of more_pairs: their share of all training pairs, drawn at random, repeatedly if they
            are few (default: each of their rows once)
        validation: held-out pairs for early stopping and search
        flops_of: train for as many FLOPs as these: outputs of train and strength, what they took;
            another model, such as a MoE to be trained, what these options would take with it
        trust_remote_code: run code that comes with the model  [default: no]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def route(
    model: StrPath,
    pairs: StrPath,
    *,
    output: StrPath,
    sharded: bool = False,
    device_map: Literal["one", "auto"] = "one",
    max_memory: Mapping[str, float] = {},
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    max_pairs: int | None = None,
    batch_tokens: int = 8192,
    diversity: Literal["none", "weights", "all"] = "none",
    probe_pairs: int = 200,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write routing statistics by subset and side: statistics.safetensors, routing.md, gate_mass.png.

    Padding is never counted; batches change nothing beyond rounding. With `diversity`, also how the experts
    differ: diversity.json, heat maps, more tables. Raises CheckpointError if the model is no MoE, DataError
    for unusable pairs.

    Options:
        model: MoE folder  [required]
        pairs: preference pairs  [required]
        output: folder to write; must not exist yet  [required]
        sharded: several processes: each holds a part of the weights, and at most a layer whole (FSDP2)
            [default: no]
        device_map: auto: one process lays layers on all GPUs, then into memory; what has no room stays
            in its files, and is read in each pass (one, auto)  [default: one]
        max_memory: with device_map auto: gigabytes of weights at most, on a GPU by its number (0=60) or
            in memory (cpu=100) (default: nine tenths of what is free)
        precision: of weights and states; auto: on a GPU the checkpoint's own, on a CPU float32, though
            bfloat16 is faster on one that has it (auto, float32, bfloat16)  [default: auto]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        max_pairs: number of pairs to use, the first ones (default: all)
        batch_tokens: tokens per forward pass  [default: 8192]
        diversity: how experts differ; weights: their updates; all: also verdicts, loss barriers and
            speculative experts (with 7 experts 100 passes over probe_pairs) (none, weights, all)
            [default: none]
        probe_pairs: with diversity all: number of pairs to use, the first ones  [default: 200]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def calibrate(
    models: StrPath | Sequence[StrPath] | Mapping[str, StrPath],
    pairs: StrPath,
    *,
    output: StrPath,
    sharded: bool = False,
    device_map: Literal["one", "auto"] = "one",
    max_memory: Mapping[str, float] = {},
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    max_pairs: int | None = None,
    batch_tokens: int = 8192,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write each model's scale, with an interval: calibration.json, for merge and fit, and calibration.md.

    A scale is the median difference, whatever its sign, of the scores of two answers to one prompt, over
    0.6745: their standard deviation where they are normal. Labels are not used. One model is in memory at a
    time. Raises DataError for unusable pairs and for a model that gives most answers the same score.

    Options:
        models: folders or hub names; without name= each has the name of its folder  [required]
        pairs: two answers per prompt; the labels are not used  [required]
        output: folder to write; must not exist yet  [required]
        sharded: several processes: each holds a part of the weights, and at most a layer whole (FSDP2)
            [default: no]
        device_map: auto: one process lays layers on all GPUs, then into memory; what has no room stays
            in its files, and is read in each pass (one, auto)  [default: one]
        max_memory: with device_map auto: gigabytes of weights at most, on a GPU by its number (0=60) or
            in memory (cpu=100) (default: nine tenths of what is free)
        precision: of weights and states; auto: on a GPU the checkpoint's own, on a CPU float32, though
            bfloat16 is faster on one that has it (auto, float32, bfloat16)  [default: auto]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        max_pairs: number of pairs to use, the first ones (default: all)
        batch_tokens: tokens per forward pass  [default: 8192]
        resamples: bootstrap resamples for the intervals  [default: 1000]
        confidence: coverage of intervals  [default: 0.95]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def changes(
    models: StrPath | Sequence[StrPath] | Mapping[str, StrPath],
    base: StrPath,
    *,
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    pairs: StrPath | None = None,
    max_pairs: int | None = None,
    batch_tokens: int = 8192,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write sizes, cosines and sign conflicts of the models' changes: changes.json, changes.md, cosine.png.

    With `pairs` also the loss barriers between models, on the straight line from one to another: for M models
    3/2 M (M - 1) + M passes of one of them over the pairs, and all are in memory; without, one tensor of each
    is at a time. Raises UnsupportedError for models that do not go together, CheckpointError for one that is
    not whole, DataError for unusable pairs. Source: TIES (arXiv 2306.01708); barriers: linear mode
    connectivity (arXiv 1912.05671).

    Options:
        models: two models or more; without name= each has the name of its folder  [required]
        base: the model that all of them were trained from  [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        pairs: preference pairs, to measure the loss barriers between the models too
        max_pairs: number of pairs to use, the first ones (default: all)
        batch_tokens: tokens per forward pass  [default: 8192]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def fit(
    model: StrPath | None = None,
    pairs: StrPath | None = None,
    *,
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    models: Sequence[StrPath] = [],
    base: StrPath | None = None,
    scope: Literal["all", "body", "mlp"] = "all",
    coordinates: Literal["average", "sum"] = "average",
    calibration: StrPath | None = None,
    method: str = "learned",
    granularity: Literal["layer", "matrix", "group", "global"] = "layer",
    initial: Literal["auto", "uniform", "usage", "usage_chosen", "one_hot"] = "auto",
    initial_member: int = 0,
    grid: Sequence[float] = [
        0.0,
        0.05,
        0.1,
        0.15,
        0.2,
        0.25,
        0.3,
        0.35,
        0.4,
        0.45,
        0.5,
        0.55,
        0.6,
        0.65,
        0.7,
        0.75,
        0.8,
        0.85,
        0.9,
        0.95,
        1.0,
    ],
    shared_weight: float | Literal["match", "learned", "learned_global"] = 0.5,
    scale: float = 2.0,
    objectives: Mapping[str, float] = {"bradley_terry": 1.0},
    label_smoothing: float = 0.0,
    margin: Literal["none", "column", "strength"] = "none",
    owners: Mapping[str, int] = {},
    optimizer: str = "auto",
    learning_rate: float = 0.05,
    max_epochs: int = 30,
    max_pairs: int | None = None,
    batch_size: int = 32,
    micro_batch_size: int = 8,
    kl: float = 0.0,
    l2: float = 0.0,
    patience: int = 5,
    evals_per_epoch: int = 4,
    holdout: float = 0.3,
    folds: int = 0,
    level: float = 0.05,
    judge: Literal["calibrated", "preferences", "accuracy", "objective"] = "calibrated",
    robust_rounds: int = 0,
    robust_temperature: float = 1.0,
    sensitivity: bool = True,
    cache_memory: float = 1.0,
    routing: StrPath | None = None,
    validation: StrPath | None = None,
    start: StrPath | None = None,
    curve: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = {},
    candidates: StrPath | None = None,
    sharded: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write merge coefficients: coefficients.safetensors and .json, report.json, fit.md, alpha.png.

    uniform and one_hot need nothing but the members, usage routing statistics of the MoE, the others
    preference pairs. Nothing but coefficients is fitted; models on disk are only read. Started by torchrun,
    processes share the pairs and the first one writes. Raises OptionError when the method lacks an input,
    CheckpointError for a foreign or damaged one, UnsupportedError for models that do not go together,
    DataError for unusable pairs.

    Options:
        model: MoE folder
        pairs: fitting pairs; needed by learned, grid and least_squares
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        models: in place of a MoE: models of one architecture; two or more, or one and base
        base: with models: a reward model that is merged as a shared expert is; it gives config,
            tokenizer and what is not merged (default: the first of models gives these, and nothing is
            shared; with coordinates sum the start that moemerge train recorded in all models)
        scope: with models: what is merged: all; body, which is all but the head; mlp (all, body, mlp)
            [default: all]
        coordinates: average: weights that sum to one; sum: changes from the base (of a MoE: from the
            shared expert) are added, W = base + sum_i c_i (W_i - base), with any c (average, sum)
            [default: average]
        calibration: with models: folder written by calibrate; each model's scores are divided by its
            scale first (saved coefficients know this of themselves)
        method: uniform, usage, usage_chosen, one_hot, learned, grid, least_squares  [default: learned]
        granularity: what shares one set of coefficients: a layer; a matrix with its bias; group: all
            MLPs, the rest of all layers (attention, norms), the head, and what is in no layer, each;
            global: everything (layer, matrix, group, global)  [default: layer]
        initial: start of the methods that learn; auto: usage if there is routing, else uniform;
            usage_chosen: gate mass on chosen answers (auto, uniform, usage, usage_chosen, one_hot)
            [default: auto]
        initial_member: one_hot: number of the member that gets all the weight  [default: 0]
        grid: method grid: the shared weights to try  [default: 0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3,
            0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
        shared_weight: weight of the shared member: a number in [0, 1], match (as in routing), learned
            (per block, as granularity says) or learned_global (one for all) (match, learned,
            learned_global)  [default: 0.5]
        scale: coordinates sum: total of the c at the start; those of the heads sum to one  [default:
            2.0]
        objectives: what method learned minimises, with weights: bradley_terry, on labels; distillation,
            to the MoE's scores; alignment, with each member on its own pairs, without labels  [default:
            bradley_terry=1.0]
        label_smoothing: bradley_terry: label smoothing, the share of labels assumed to be wrong
            [default: 0.0]
        margin: bradley_terry: margin that chosen must win by: the data's margin column, or the MoE's
            (the models' mean) own score difference (none, column, strength)  [default: none]
        owners: for alignment and least_squares, subset=number of the member to which its pairs belong
            (default: a MoE's routing decides; to a list of models all pairs belong alike)
        optimizer: lbfgs, adam, cma; auto: lbfgs up to 2048 pairs, else adam  [default: auto]
        learning_rate: of the coefficient logits (Adam)  [default: 0.05]
        max_epochs: most passes over the fitting pairs (a generation of cma counts as one)  [default:
            30]
        max_pairs: largest number of fitting pairs, and of held-out ones, drawn at random
        batch_size: pairs per step (Adam)  [default: 32]
        micro_batch_size: pairs per forward pass; changes memory, not results  [default: 8]
        kl: weight of the KL divergence from the initial coefficients  [default: 0.0]
        l2: pull towards the start, squared distance: of logits, or of a sum's c (of these in
            least_squares too, whose error then counts in units of what one model's change makes of
            outputs)  [default: 0.0]
        patience: evaluations without improvement before stopping  [default: 5]
        evals_per_epoch: evaluations on held-out pairs per epoch (Adam)  [default: 4]
        holdout: share of pairs held out when no validation pairs are given  [default: 0.3]
        folds: 0, or number of parts: each is held out in turn, and the coefficients are averaged
            [default: 0]
        level: significance level: the initial coefficients are kept unless p on held-out pairs is below
            [default: 0.05]
        judge: criterion on held-out pairs, also for method grid: calibrated, the Bradley-Terry loss
            after the best scale factor for each candidate, so that no scale is rewarded; preferences,
            that loss as it is; accuracy; objective, what is fitted (calibrated, preferences, accuracy,
            objective)  [default: calibrated]
        robust_rounds: further rounds, with more weight on pairs that the merged model ranks badly
            [default: 0]
        robust_temperature: robust_rounds: weights are exp(loss / temperature); wrong labels gain too
            [default: 1.0]
        sensitivity: report what each layer's coefficients contribute  [default: yes]
        cache_memory: GB of memory to cache the states of the layers below the first merged one; what
            does not fit goes into a file beside output; 0: no cache; the results are the same
            [default: 1.0]
        routing: folder written by route; needed by usage and match
        validation: held-out pairs (default: a share of the fitting pairs)
        start: coefficients of the same members to start from, in place of initial
        curve: method grid: test pairs, name=file, on which every weight is also measured, by subset
        candidates: robust_rounds: scored candidates, whose overrated answers become pairs
        sharded: several processes: each holds a part of the weights, and at most a layer whole (FSDP2)
            [default: no]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def gate(
    model: StrPath,
    pairs: StrPath,
    *,
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    max_pairs: int | None = None,
    batch_tokens: int = 8192,
    shard_size: int = 5000000000,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write the MoE with routers fitted in closed form; gate.json says what routing is worth.

    Every expert scores the pairs alone; how much better than the others it does on a prompt's pairs is
    regressed (ridge) on the prompt's mean state, which is what a prompt gate sees, at the first layer with
    experts; the layers above learn to choose alike. All else stays as it is. Raises UnsupportedError for a
    MoE that does not choose one expert by the prompt, DataError for unusable pairs, and for pairs without
    prompts or of a single one.

    Options:
        model: MoE folder of upcycle with experts, gate prompt and no shared_expert  [required]
        pairs: preference pairs with many different prompts: they say which expert suits which prompt
            [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        max_pairs: number of pairs to use, the first ones (default: all)
        batch_tokens: tokens per forward pass  [default: 8192]
        shard_size: largest shard in bytes  [default: 5000000000]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def merge(
    model: StrPath | None = None,
    coefficients: StrPath | None = None,
    *,
    output: StrPath,
    models: Sequence[StrPath] = [],
    base: StrPath | None = None,
    scope: Literal["all", "body", "mlp"] = "all",
    coordinates: Literal["average", "sum"] = "average",
    calibration: StrPath | None = None,
    method: str = "routing_normalized_average",
    parameters: Mapping[str, float | bool | str] = {},
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
    shard_size: int = 5000000000,
    weights: Sequence[float] = [],
    scale: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write the dense model: what `options` name is merged by `options.method`, everything else is kept.

    From a MoE the MLPs are merged, from models what `scope` says. Keeps class, config, tokenizer, chat
    template and, unless another is asked for, dtype. Holds one shard at once. Our average is compared with a
    plain sum before it is written, in float64, or in float32 where the result has two bytes a number;
    everything is read back and compared with it, bit for bit.
    Raises CheckpointError when tensors are missing, left over, misshapen or not finite, when the coefficients
    belong to another model, or when a comparison fails; UnsupportedError for models that do not go together;
    OptionError for what the method does not take. Source: XFT (arXiv 2404.15247), UMM-RM (arXiv 2512.00724);
    of models: WARM (arXiv 2401.12187), DogeRM (arXiv 2407.01470); other methods: mergekit (arXiv 2403.13257).

    Options:
        model: MoE folder
        coefficients: folder written by fit; a method of mergekit takes them as its weight
        output: folder to write; must not exist yet  [required]
        models: in place of a MoE: models of one architecture; two or more, or one and base
        base: with models: a reward model that is merged as a shared expert is; it gives config,
            tokenizer and what is not merged (default: the first of models gives these, and nothing is
            shared; with coordinates sum the start that moemerge train recorded in all models)
        scope: with models: what is merged: all; body, which is all but the head; mlp (all, body, mlp)
            [default: all]
        coordinates: average: weights that sum to one; sum: changes from the base (of a MoE: from the
            shared expert) are added, W = base + sum_i c_i (W_i - base), with any c (average, sum)
            [default: average]
        calibration: with models: folder written by calibrate; each model's scores are divided by its
            scale first (saved coefficients know this of themselves)
        method: routing_normalized_average, our own, or a method of mergekit: linear, ties, karcher, ...
            [default: routing_normalized_average]
        parameters: parameters of a method of mergekit, e.g. density=0.5, the same for all experts
        dtype: dtype of the result; keep: that of the dense model (keep, float32, bfloat16, float16)
            [default: keep]
        shard_size: largest shard in bytes  [default: 5000000000]
        weights: with models, in place of coefficients: a weight for each, the base first if there is
            one; they need not sum to one (default: equal). With coordinates sum: the c of each but the
            base
        scale: coordinates sum: total of the c if no weights are given (default: 2, so 2/M for each of M
            models)
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def fit_models(
    models: Sequence[StrPath],
    pairs: StrPath | None,
    output: StrPath,
    base: StrPath | None = None,
    *,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    scope: Literal["all", "body", "mlp"] = "all",
    coordinates: Literal["average", "sum"] = "average",
    calibration: StrPath | None = None,
    method: str = "learned",
    granularity: Literal["layer", "matrix", "group", "global"] = "layer",
    initial: Literal["auto", "uniform", "usage", "usage_chosen", "one_hot"] = "auto",
    initial_member: int = 0,
    grid: Sequence[float] = [
        0.0,
        0.05,
        0.1,
        0.15,
        0.2,
        0.25,
        0.3,
        0.35,
        0.4,
        0.45,
        0.5,
        0.55,
        0.6,
        0.65,
        0.7,
        0.75,
        0.8,
        0.85,
        0.9,
        0.95,
        1.0,
    ],
    shared_weight: float | Literal["match", "learned", "learned_global"] = 0.5,
    scale: float = 2.0,
    objectives: Mapping[str, float] = {"bradley_terry": 1.0},
    label_smoothing: float = 0.0,
    margin: Literal["none", "column", "strength"] = "none",
    owners: Mapping[str, int] = {},
    optimizer: str = "auto",
    learning_rate: float = 0.05,
    max_epochs: int = 30,
    max_pairs: int | None = None,
    batch_size: int = 32,
    micro_batch_size: int = 8,
    kl: float = 0.0,
    l2: float = 0.0,
    patience: int = 5,
    evals_per_epoch: int = 4,
    holdout: float = 0.3,
    folds: int = 0,
    level: float = 0.05,
    judge: Literal["calibrated", "preferences", "accuracy", "objective"] = "calibrated",
    robust_rounds: int = 0,
    robust_temperature: float = 1.0,
    sensitivity: bool = True,
    cache_memory: float = 1.0,
    routing: StrPath | None = None,
    validation: StrPath | None = None,
    start: StrPath | None = None,
    curve: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = {},
    candidates: StrPath | None = None,
    sharded: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Merge coefficients for whole models of one architecture: `fit(models=..., pairs=..., output=..., ...)`.

    `options` are those of `moemerge fit`: scope, method, shared_weight, ... Returns `output`, which
    `merge_models` takes as coefficients; raises as fit does.

    Options:
        models: in place of a MoE: models of one architecture; two or more, or one and base
        pairs: fitting pairs; needed by learned, grid and least_squares
        output: folder to write; must not exist yet  [required]
        base: with models: a reward model that is merged as a shared expert is; it gives config,
            tokenizer and what is not merged (default: the first of models gives these, and nothing is
            shared; with coordinates sum the start that moemerge train recorded in all models)
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        scope: with models: what is merged: all; body, which is all but the head; mlp (all, body, mlp)
            [default: all]
        coordinates: average: weights that sum to one; sum: changes from the base (of a MoE: from the
            shared expert) are added, W = base + sum_i c_i (W_i - base), with any c (average, sum)
            [default: average]
        calibration: with models: folder written by calibrate; each model's scores are divided by its
            scale first (saved coefficients know this of themselves)
        method: uniform, usage, usage_chosen, one_hot, learned, grid, least_squares  [default: learned]
        granularity: what shares one set of coefficients: a layer; a matrix with its bias; group: all
            MLPs, the rest of all layers (attention, norms), the head, and what is in no layer, each;
            global: everything (layer, matrix, group, global)  [default: layer]
        initial: start of the methods that learn; auto: usage if there is routing, else uniform;
            usage_chosen: gate mass on chosen answers (auto, uniform, usage, usage_chosen, one_hot)
            [default: auto]
        initial_member: one_hot: number of the member that gets all the weight  [default: 0]
        grid: method grid: the shared weights to try  [default: 0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3,
            0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
        shared_weight: weight of the shared member: a number in [0, 1], match (as in routing), learned
            (per block, as granularity says) or learned_global (one for all) (match, learned,
            learned_global)  [default: 0.5]
        scale: coordinates sum: total of the c at the start; those of the heads sum to one  [default:
            2.0]
        objectives: what method learned minimises, with weights: bradley_terry, on labels; distillation,
            to the MoE's scores; alignment, with each member on its own pairs, without labels  [default:
            bradley_terry=1.0]
        label_smoothing: bradley_terry: label smoothing, the share of labels assumed to be wrong
            [default: 0.0]
        margin: bradley_terry: margin that chosen must win by: the data's margin column, or the MoE's
            (the models' mean) own score difference (none, column, strength)  [default: none]
        owners: for alignment and least_squares, subset=number of the member to which its pairs belong
            (default: a MoE's routing decides; to a list of models all pairs belong alike)
        optimizer: lbfgs, adam, cma; auto: lbfgs up to 2048 pairs, else adam  [default: auto]
        learning_rate: of the coefficient logits (Adam)  [default: 0.05]
        max_epochs: most passes over the fitting pairs (a generation of cma counts as one)  [default:
            30]
        max_pairs: largest number of fitting pairs, and of held-out ones, drawn at random
        batch_size: pairs per step (Adam)  [default: 32]
        micro_batch_size: pairs per forward pass; changes memory, not results  [default: 8]
        kl: weight of the KL divergence from the initial coefficients  [default: 0.0]
        l2: pull towards the start, squared distance: of logits, or of a sum's c (of these in
            least_squares too, whose error then counts in units of what one model's change makes of
            outputs)  [default: 0.0]
        patience: evaluations without improvement before stopping  [default: 5]
        evals_per_epoch: evaluations on held-out pairs per epoch (Adam)  [default: 4]
        holdout: share of pairs held out when no validation pairs are given  [default: 0.3]
        folds: 0, or number of parts: each is held out in turn, and the coefficients are averaged
            [default: 0]
        level: significance level: the initial coefficients are kept unless p on held-out pairs is below
            [default: 0.05]
        judge: criterion on held-out pairs, also for method grid: calibrated, the Bradley-Terry loss
            after the best scale factor for each candidate, so that no scale is rewarded; preferences,
            that loss as it is; accuracy; objective, what is fitted (calibrated, preferences, accuracy,
            objective)  [default: calibrated]
        robust_rounds: further rounds, with more weight on pairs that the merged model ranks badly
            [default: 0]
        robust_temperature: robust_rounds: weights are exp(loss / temperature); wrong labels gain too
            [default: 1.0]
        sensitivity: report what each layer's coefficients contribute  [default: yes]
        cache_memory: GB of memory to cache the states of the layers below the first merged one; what
            does not fit goes into a file beside output; 0: no cache; the results are the same
            [default: 1.0]
        routing: folder written by route; needed by usage and match
        validation: held-out pairs (default: a share of the fitting pairs)
        start: coefficients of the same members to start from, in place of initial
        curve: method grid: test pairs, name=file, on which every weight is also measured, by subset
        candidates: robust_rounds: scored candidates, whose overrated answers become pairs
        sharded: several processes: each holds a part of the weights, and at most a layer whole (FSDP2)
            [default: no]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def merge_models(
    models: Sequence[StrPath],
    output: StrPath,
    base: StrPath | None = None,
    coefficients: StrPath | Sequence[float] | None = None,
    *,
    scope: Literal["all", "body", "mlp"] = "all",
    coordinates: Literal["average", "sum"] = "average",
    calibration: StrPath | None = None,
    method: str = "routing_normalized_average",
    parameters: Mapping[str, float | bool | str] = {},
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
    shard_size: int = 5000000000,
    scale: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Merge whole models of one architecture: `merge(models=..., output=..., ...)`.

    `coefficients` is the folder that `fit_models` wrote, or one weight per model, the base first if there is
    one (default: equal). `options` are those of `moemerge merge`: scope, method, parameters, dtype, ...
    Returns `output`; raises as merge does.

    Options:
        models: in place of a MoE: models of one architecture; two or more, or one and base
        output: folder to write; must not exist yet  [required]
        base: with models: a reward model that is merged as a shared expert is; it gives config,
            tokenizer and what is not merged (default: the first of models gives these, and nothing is
            shared; with coordinates sum the start that moemerge train recorded in all models)
        coefficients: folder written by fit; a method of mergekit takes them as its weight
        scope: with models: what is merged: all; body, which is all but the head; mlp (all, body, mlp)
            [default: all]
        coordinates: average: weights that sum to one; sum: changes from the base (of a MoE: from the
            shared expert) are added, W = base + sum_i c_i (W_i - base), with any c (average, sum)
            [default: average]
        calibration: with models: folder written by calibrate; each model's scores are divided by its
            scale first (saved coefficients know this of themselves)
        method: routing_normalized_average, our own, or a method of mergekit: linear, ties, karcher, ...
            [default: routing_normalized_average]
        parameters: parameters of a method of mergekit, e.g. density=0.5, the same for all experts
        dtype: dtype of the result; keep: that of the dense model (keep, float32, bfloat16, float16)
            [default: keep]
        shard_size: largest shard in bytes  [default: 5000000000]
        scale: coordinates sum: total of the c if no weights are given (default: 2, so 2/M for each of M
            models)
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def export(
    model: StrPath | None = None,
    coefficients: StrPath | None = None,
    *,
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    models: Sequence[StrPath] = [],
    base: StrPath | None = None,
    scope: Literal["all", "body", "mlp"] = "all",
    coordinates: Literal["average", "sum"] = "average",
    calibration: StrPath | None = None,
    form: Literal["dense", "qwen2_moe", "linear"] = "dense",
    pairs: StrPath | None = None,
    holdout: float = 0.2,
    least_agreement: float = 0.95,
    batch_tokens: int = 8192,
    shard_size: int = 5000000000,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write the members as dense checkpoints, and linear.yml if coefficients are given.

    Of a MoE: shared/ (if there is one), expert-0/ ... expert-{N-1}/. What they have in common is stored once
    and hard-linked, or copied where that cannot be; so rewrite such a file as a new one, not in place. Of a
    list of models: those that are not the reward models which take part in the merge (a language model, or a
    model whose vocabulary is not the common one), as base/, model-0/ ...; linear.yml names the others where
    they are. Weights keep their dtype. With `form` qwen2_moe there is one checkpoint instead, the whole MoE
    for stock transformers (see qwen2_moe); with linear a dense model under a stock head (see linear_head).
    Raises CheckpointError for what is not whole and for coefficients of another source, UnsupportedError for
    a model that the form cannot express.

    Options:
        model: MoE folder
        coefficients: folder written by fit: also writes linear.yml, the merge for stock mergekit
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        models: in place of a MoE: models of one architecture; two or more, or one and base
        base: with models: a reward model that is merged as a shared expert is; it gives config,
            tokenizer and what is not merged (default: the first of models gives these, and nothing is
            shared; with coordinates sum the start that moemerge train recorded in all models)
        scope: with models: what is merged: all; body, which is all but the head; mlp (all, body, mlp)
            [default: all]
        coordinates: average: weights that sum to one; sum: changes from the base (of a MoE: from the
            shared expert) are added, W = base + sum_i c_i (W_i - base), with any c (average, sum)
            [default: average]
        calibration: with models: folder written by calibrate; each model's scores are divided by its
            scale first (saved coefficients know this of themselves)
        form: dense: each expert or model as a model of its own; qwen2_moe: a MoE that stock
            transformers loads; linear: a model under a head of moemerge's own with a stock head
            instead, fitted to its scores by least squares (dense, qwen2_moe, linear)  [default: dense]
        pairs: form linear: pairs on whose texts the head is fitted
        holdout: form linear: share of pairs held out to compare both heads  [default: 0.2]
        least_agreement: form linear: smallest share of held-out pairs on which both heads prefer the
            same answer; below it nothing is written  [default: 0.95]
        batch_tokens: form linear: tokens per forward pass  [default: 8192]
        shard_size: largest shard in bytes  [default: 5000000000]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def sample(
    model: StrPath,
    prompts: StrPath,
    *,
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    gold_model: StrPath | None = None,
    gold_function: str | Callable[..., Any] | None = None,
    per_prompt: int = 16,
    max_prompts: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_tokens: int = 8192,
    trust_remote_code: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Draw `per_prompt` answers to every prompt; write candidates.jsonl.gz, which evaluate reads.

    Answers get gold scores if gold_model or gold_function is given, else evaluate must be given one of them.
    Answers without text are left out and counted, and so are prompts with fewer than two answers. Each batch
    has a seed of its own and is kept as soon as it is drawn: a killed run, started again, goes on and ends
    with the same answers. Raises DataError for unusable rows, CheckpointError for an unusable policy,
    OptionError if there is no such gold function.

    Options:
        model: policy: a causal language model, folder or hub name  [required]
        prompts: rows with a prompt; equal prompts count once  [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        gold_model: reward model, or a scorer.json, whose scores are gold
        gold_function: FILE.py:NAME or MODULE:NAME, a function of prompt and answer that gives the gold
            score
        per_prompt: answers to each prompt  [default: 16]
        max_prompts: number of prompts to use, the first ones (default: all)
        max_new_tokens: longest answer in tokens; longer ones are cut  [default: 256]
        temperature: sampling temperature of the policy  [default: 1.0]
        top_p: nucleus sampling: draw from the most likely tokens that together have this probability;
            below 1, the KL of best-of-n is not log n - (n - 1) / n  [default: 1.0]
        batch_tokens: tokens of prompts and answers in one batch  [default: 8192]
        trust_remote_code: run code that comes with the model  [default: no]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def optimise(
    policy: StrPath,
    models: StrPath | Sequence[StrPath] | Mapping[str, StrPath],
    prompts: StrPath,
    *,
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    gold_model: StrPath | None = None,
    gold_function: str | Callable[..., Any] | None = None,
    refresh: Mapping[str, Literal["during", "before"]] = {},
    refresh_every: int = 1,
    verifier: str | Callable[..., Any] | None = None,
    right_above: float | None = None,
    negatives: Literal["both", "answers", "made"] = "both",
    corrupt: str | Callable[..., Any] | None = None,
    tries: int = 3,
    refresh_trains: Literal["all", "head", "experts", "coefficients"] = "all",
    refresh_coefficients: StrPath | None = None,
    refresh_learning_rate: float | None = None,
    refresh_center: float = 0.01,
    replay_pairs: StrPath | None = None,
    replay: float = 0.5,
    held_out_pairs: StrPath | None = None,
    steps: int = 200,
    batch_size: int = 32,
    gradient_accumulation: int = 1,
    answers_per_prompt: int = 4,
    credit: Literal["answer", "token"] = "answer",
    credit_weight: float = 1.0,
    learning_rate: float = 1e-05,
    kl_penalty: float = 0.0,
    max_grad_norm: float = 1.0,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    measure_steps: int | None = None,
    measure_prompts: int = 64,
    measure_answers: int = 4,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    gradient_checkpointing: bool = False,
    report_to: Sequence[str] = [],
    confidence: float = 0.95,
    resamples: int = 2000,
    baseline: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Optimise the policy against each reward model; measure gold, proxy and KL on prompts set aside.

    Policy, its first state, reward model and gold model are in memory at once. All models meet the same
    prompts with the same seeds, so that differences are paired. A finished model's run is kept: a killed run,
    started again, goes on with the next. Writes report.json, report.md, optimise.png and samples.jsonl.gz,
    the measured answers with their scores; of reward models that were refreshed (Cooper, arXiv 2508.05613)
    also refreshed/NAME, the model, and refresh.jsonl.gz, the verified pairs. Raises OptionError, DataError,
    CheckpointError, or UnsupportedError for a refresh of what has no weights here.

    Options:
        policy: policy to start from: a causal language model, folder or hub name  [required]
        models: reward models: folders, hub names or scorer.json files; the policy is optimised against
            each separately  [required]
        prompts: rows with a prompt; equal prompts count once  [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        gold_model: reward model, or a scorer.json, whose scores are gold
        gold_function: FILE.py:NAME or MODULE:NAME, a function of prompt and answer that gives the gold
            score
        refresh: reward models that are refreshed, by name; during: while the policy trains; before: by
            as many updates on the first policy's answers, the control of equal budget; others stay as
            they are (during, before)
        refresh_every: refresh: policy steps per update of a reward model  [default: 1]
        verifier: refresh: FILE.py:NAME or MODULE:NAME, a function of prompt and answer: 1 if the answer
            is right, 0 if it is wrong, None if it cannot say
        right_above: refresh, in place of verifier: gold score above which answers are right, others
            wrong
        negatives: refresh: answers: the policy's own wrong ones to the same prompt; made: right answers
            made wrong; both: made where there are no wrong ones (both, answers, made)  [default: both]
        corrupt: refresh: a function of prompt and right answer that makes a wrong one (default: words
            are deleted and change places)
        tries: refresh: most attempts to make an answer that the rule calls wrong  [default: 3]
        refresh_trains: refresh: what of the reward model trains; coefficients: only how a MoE's experts
            are merged; the merge is then the reward model (all, head, experts, coefficients)  [default:
            all]
        refresh_coefficients: refresh_trains coefficients: folder written by fit, to start from
            (default: equal ones)
        refresh_learning_rate: refresh: default 1e-5, head 1e-4, coefficients 0.05 (of their logits)
        refresh_center: refresh: weight of the pair's squared sum of scores, which holds their level
            [default: 0.01]
        replay_pairs: refresh: pairs that the model was trained on, to be mixed in
        replay: refresh: share of replay_pairs in an update  [default: 0.5]
        held_out_pairs: pairs on which the reward models' accuracy is measured while the policy trains
        steps: optimiser steps  [default: 200]
        batch_size: answers per pass  [default: 32]
        gradient_accumulation: passes per optimiser step  [default: 1]
        answers_per_prompt: answers per prompt, which are each other's baseline (RLOO)  [default: 4]
        credit: token: each token's baseline also has what the reward model made of the answer so far
            (RED; decoders only) (answer, token)  [default: answer]
        credit_weight: credit token: weight of that in the baseline  [default: 1.0]
        learning_rate: learning rate, constant  [default: 1e-05]
        kl_penalty: weight of the KL divergence from the initial policy in the reward  [default: 0.0]
        max_grad_norm: gradient clipping  [default: 1.0]
        max_new_tokens: longest answer in tokens; longer ones are cut  [default: 64]
        temperature: sampling temperature of the policy  [default: 1.0]
        measure_steps: steps between measurements (default: 20 of them)
        measure_prompts: prompts held out to measure on, at most half  [default: 64]
        measure_answers: answers to each of these  [default: 4]
        precision: auto: bfloat16 autocast on a GPU, float32 on CPU (auto, float32, bfloat16)  [default:
            auto]
        gradient_checkpointing: less memory, about a third more time  [default: no]
        report_to: trackers that TRL reports to while it runs: tensorboard, wandb, ...
        confidence: coverage of intervals  [default: 0.95]
        resamples: bootstrap resamples  [default: 2000]
        baseline: model that the others are compared with
        trust_remote_code: run code that comes with the models  [default: no]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def evaluate(
    models: StrPath | Sequence[StrPath] | Mapping[str, StrPath],
    data: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = {},
    *,
    output: StrPath,
    sharded: bool = False,
    device_map: Literal["one", "auto"] = "one",
    max_memory: Mapping[str, float] = {},
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    gold_model: StrPath | None = None,
    gold_function: str | Callable[..., Any] | None = None,
    probes: Sequence[str] = ["accuracy", "calibration", "rewardbench", "rmbench", "best_of_n"],
    baseline: str | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    sections: Mapping[str, Sequence[str]] = {},
    rewardbench: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = {},
    rmbench: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = {},
    rewardbench_template: Literal["chat", "plain"] = "chat",
    rewardbench_max_length: int = 2048,
    max_pairs: int | None = None,
    batch_tokens: int = 8192,
    bias_pairs: int = 500,
    ensembles: Mapping[str, Sequence[str]] = {},
    ensemble_by: Sequence[Literal["mean", "worst", "variance"]] = ["mean", "worst", "variance"],
    variance_penalty: float = 0.5,
    pairs: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = {},
    candidates: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = {},
    calibration: StrPath | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Score every model on every set, once, and run the probes on the scores.

    One model is in memory at a time. A row that is too long for one model's tokenizer is left out for all,
    so that comparisons stay paired. Candidates' gold scores are those of the file, or of `gold_model` or
    `gold_function`. Writes scores.safetensors, report.json, report.html, report.md, plots and, of
    RewardBench, results in its own form.
    Raises OptionError if nothing can be measured or the baseline is no model, DataError for unusable rows.

    Options:
        models: folders or hub names, or a scorer.json; without name= each has the name of its folder
            [required]
        data: files or hub name:split; their columns show which are pairs, candidates, RewardBench or
            RM-Bench
        output: folder to write; must not exist yet  [required]
        sharded: several processes: each holds a part of the weights, and at most a layer whole (FSDP2)
            [default: no]
        device_map: auto: one process lays layers on all GPUs, then into memory; what has no room stays
            in its files, and is read in each pass (one, auto)  [default: one]
        max_memory: with device_map auto: gigabytes of weights at most, on a GPU by its number (0=60) or
            in memory (cpu=100) (default: nine tenths of what is free)
        precision: of weights and states; auto: on a GPU the checkpoint's own, on a CPU float32, though
            bfloat16 is faster on one that has it (auto, float32, bfloat16)  [default: auto]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        gold_model: reward model, or a scorer.json, whose scores are gold
        gold_function: FILE.py:NAME or MODULE:NAME, a function of prompt and answer that gives the gold
            score
        probes: what to measure; biases stands for all bias probes  [default: accuracy, calibration,
            rewardbench, rmbench, best_of_n]
        baseline: model that the others are compared with, pair by pair
        confidence: coverage of intervals  [default: 0.95]
        resamples: bootstrap resamples  [default: 2000]
        sections: groups of subsets, each with an accuracy of its own: section=subset,subset
        rewardbench: name=file, RewardBench 1 or 2 in its own columns; the prior sets of version 1 by
            their names (anthropic_helpful, anthropic_hhh, shp, summarize)
        rmbench: name=file, RM-Bench in its own columns, read with rewardbench_template and
            rewardbench_max_length
        rewardbench_template: how RewardBench's rows become text; chat: by the tokenizer's template;
            plain: turns joined by newlines, for tokenizers without one (chat, plain)  [default: chat]
        rewardbench_max_length: longest text of RewardBench in tokens; longer ones are cut, as in its
            own code  [default: 2048]
        max_pairs: largest number of pairs per test set; they are drawn at random
        batch_tokens: tokens per forward pass  [default: 8192]
        bias_pairs: largest number of pairs per test set that bias probes edit  [default: 500]
        ensembles: name: models whose scores are combined, as ensemble_by says
        ensemble_by: mean; worst: the lowest score (WCO); variance: mean - variance_penalty * variance
            (UWO) (mean, worst, variance)  [default: mean, worst, variance]
        variance_penalty: of ensemble_by variance (arXiv 2310.02743)  [default: 0.5]
        pairs: files or hub name:split, preference pairs
        candidates: files or hub name:split, prompts with scored candidates
        calibration: folder written by calibrate; in ensembles each member's scores are divided by its
            scale
        trust_remote_code: run code that comes with the model  [default: no]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def few_shot(
    model: StrPath,
    pairs: StrPath,
    *,
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    form: Literal["scalar", "ranked"] = "scalar",
    criterion: str = "it is helpful, correct and harmless",
    yes: str = "Yes",
    no: str = "No",
    examples: int = 80,
    shots: int = 4,
    select: Literal["reinforce", "greedy"] = "reinforce",
    steps: int = 600,
    masks: int = 32,
    learning_rate: float = 0.1,
    draws: int = 10,
    held_out: StrPath | None = None,
    max_held_out: int = 1000,
    confidence: float = 0.95,
    resamples: int = 2000,
    batch_tokens: int = 8192,
    trust_remote_code: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Make a scorer of a language model and a few labelled pairs, and measure it on held-out pairs.

    Some attention heads get their mean activations over the examples; what the model then says of an answer
    is the score. The control, a ridge probe on the same pairs and the same activations, is written beside it.
    Writes scorer.json and heads.safetensors, the same in probe/, few_shot.json, report.html, report.md and
    choice.png; `evaluate` and others take the folder, and probe/, as scorers. The language model is not
    copied. A killed run goes on where it was. Raises OptionError if a verdict is no single token, DataError
    for too few pairs, UnsupportedError for a model whose heads are not known, CheckpointError.

    Options:
        model: language model, folder or hub name; it is not trained  [required]
        pairs: preference pairs, from which the examples are drawn  [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        form: scalar: whether an answer meets the criterion, yes or no; ranked: which of two answers
            does so better, A or B, in both orders: for rows of two answers only (scalar, ranked)
            [default: scalar]
        criterion: criterion that answers are judged by, as the end of a question  [default: it is
            helpful, correct and harmless]
        yes: good verdict, a single token (form ranked: A)  [default: Yes]
        no: bad verdict, a single token (form ranked: B)  [default: No]
        examples: pairs to learn from, drawn at random  [default: 80]
        shots: examples with right verdicts shown before each one while mean activations are taken
            [default: 4]
        select: how attention heads are selected; greedy: those that help most individually (reinforce,
            greedy)  [default: reinforce]
        steps: select reinforce: steps, one example each  [default: 600]
        masks: select reinforce: sets of heads tried per step  [default: 32]
        learning_rate: select reinforce: learning rate (Adam)  [default: 0.1]
        draws: select reinforce: sets drawn at the end; the best is kept  [default: 10]
        held_out: held-out pairs to measure on (default: the rest of pairs, with other prompts)
        max_held_out: largest number of held-out pairs, drawn at random  [default: 1000]
        confidence: coverage of intervals  [default: 0.95]
        resamples: bootstrap resamples  [default: 2000]
        batch_tokens: tokens per forward pass  [default: 8192]
        trust_remote_code: run code that comes with the model  [default: no]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def explain(
    model: StrPath,
    pairs: StrPath,
    *,
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    max_pairs: int | None = 500,
    least: int = 5,
    shown: int = 12,
    batch_tokens: int = 8192,
    confidence: float = 0.95,
    trust_remote_code: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write what each token adds to answers' scores, which phrases pay, and how early pairs are decided.

    Writes tokens.jsonl.gz (each answer's tokens with their rewards, in units of the score), explanation.json,
    report.html, report.md and decided.png; of a head with factors, what each does. The result's table are the
    phrases. Raises UnsupportedError for an encoder, whose tokens see later ones.

    Options:
        model: reward model: a decoder, dense or MoE  [required]
        pairs: preference pairs whose answers are explained  [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        max_pairs: largest number of pairs; they are drawn at random  [default: 500]
        least: fewest prompts in whose answers a phrase must occur to be reported  [default: 5]
        shown: pairs shown with their texts: half of them the most wrongly ranked, half drawn at random
            [default: 12]
        batch_tokens: tokens per forward pass  [default: 8192]
        confidence: coverage of intervals  [default: 0.95]
        trust_remote_code: run code that comes with the model  [default: no]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def choose(
    evaluations: Sequence[StrPath],
    pairs: StrPath | Sequence[StrPath] | Mapping[str, StrPath],
    *,
    ranks: Mapping[str, int],
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    level: float = 0.05,
    confidence: float = 0.95,
    resamples: int = 2000,
    notes: Mapping[str, str] = {},
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write which candidate is taken: choice.json, report.html, report.md and accuracy.png.

    The simplest candidate is taken, of several the best, unless a costlier one is better beyond chance and no
    less accurate. Pairs that one of the models has no score of are left out for all. Raises ArtifactError for
    an evaluation that was not made on these pairs, OptionError for a candidate that none of them has,
    DataError if no pair is left.

    Options:
        evaluations: folders written by evaluate on the parts  [required]
        pairs: held-out parts of the data, named as in the evaluations; no candidate was made from the
            part on which it is scored  [required]
        ranks: the candidates and the cost rank of each: name=0 for the simplest; other models in the
            evaluations are shown, but never taken  [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        level: significance level: a costlier candidate is taken only if it is better with p below this
            [default: 0.05]
        confidence: coverage of intervals  [default: 0.95]
        resamples: bootstrap resamples for the intervals  [default: 2000]
        notes: a few words on each candidate, for the report
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def attack(
    model: StrPath,
    pairs: StrPath,
    *,
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    gold_model: StrPath | None = None,
    gold_function: str | Callable[..., Any] | None = None,
    policy: StrPath | None = None,
    other_policy: StrPath | None = None,
    side: Literal["rejected", "chosen"] = "rejected",
    keep: float = 0.25,
    answers: int = 1,
    top: int = 5,
    guidance: float = 0.5,
    temperature: float = 0.6,
    formula: Literal["balanced", "reform"] = "balanced",
    max_new_tokens: int = 128,
    max_pairs: int | None = 200,
    search: Literal["guided", "random", "decode"] = "guided",
    patch: Literal["rejected", "both"] = "rejected",
    edits: Sequence[str] = [],
    words: Sequence[str] = [],
    steps: int = 6,
    proposals: int = 12,
    beam: int = 1,
    confidence: float = 0.95,
    resamples: int = 2000,
    batch_tokens: int = 8192,
    trust_remote_code: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Search for rejected answers, edited or newly written, that the model scores above the chosen answer.

    Of side chosen: for good answers that it scores below the rejected one. Only pairs that the model judges
    rightly are attacked and, with gold, whose rejected answer is the worse one. Writes attacks.jsonl.gz
    (what came of each; pairs ranked wrongly too, as right: false), patch.jsonl (the found pairs as training
    data for `train`: prompt, chosen, rejected), report.json, report.html, report.md and attack.png. Of a
    decoder the page also shows what each word of the worst cases adds. What search decode has written is
    kept: a killed run, started again, goes on. Raises DataError if no pair can be attacked, OptionError for
    unknown edits or an unusable gold function, CheckpointError for an unusable model or policy.

    Options:
        model: reward model: folder or hub name, or a scorer.json  [required]
        pairs: preference pairs whose rejected answers are edited  [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        gold_model: reward model, or a scorer.json, whose scores are gold
        gold_function: FILE.py:NAME or MODULE:NAME, a function of prompt and answer that gives the gold
            score
        policy: search decode: language model that writes the answers; ideally one that was trained to
            write answers of the side that is attacked
        other_policy: search decode, in place of gold: language model of the other side's answers; a new
            answer stays on its side while policy finds it more likely than this model does
        side: search decode: rejected: bad answers that score above the chosen one; chosen: good answers
            that score below the rejected one (rejected, chosen)  [default: rejected]
        keep: search decode: share of the original answer's words that each new answer starts with
            [default: 0.25]
        answers: search decode: new answers per pair  [default: 1]
        top: search decode: number of most likely tokens among which the reward model chooses  [default:
            5]
        guidance: search decode: weight of the reward model against the policy; 0: the policy alone, the
            control for guidance  [default: 0.5]
        temperature: search decode: sampling temperature  [default: 0.6]
        formula: search decode: balanced: log-probabilities and standardised scores, weighted by
            guidance; reform: sum of two softmaxes, as in REFORM's code, without guidance (balanced,
            reform)  [default: balanced]
        max_new_tokens: search decode: most new tokens per answer; longer answers are cut  [default:
            128]
        max_pairs: largest number of pairs; they are drawn at random  [default: 200]
        search: guided: keep edits that raise the score until it is above the chosen answer's; random: 1
            to steps random edits of every answer, the control for guidance; decode: a language model
            (policy) writes new answers, and the reward model has a say in each token (guided, random,
            decode)  [default: guided]
        patch: patch.jsonl has each found answer as the rejected one; both: also the same edits of the
            chosen answer, against the rejected one as it was, so that being edited is no sign of being
            worse (rejected, both)  [default: rejected]
        edits: edits to search among (default: all that keep the content; with gold, all)
        words: words that insert_word adds, in place of the built-in ones
        steps: most edits per answer, one after another  [default: 6]
        proposals: edits tried per step for each answer of the beam  [default: 12]
        beam: beam width: answers kept per step; 1: greedy  [default: 1]
        confidence: coverage of intervals  [default: 0.95]
        resamples: bootstrap resamples  [default: 2000]
        batch_tokens: tokens per forward pass or decoding batch  [default: 8192]
        trust_remote_code: run code that comes with the model  [default: no]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def robustness(
    attacks: StrPath | Sequence[StrPath] | Mapping[str, StrPath],
    *,
    output: StrPath,
    baseline: str | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write whose right verdicts hold: robustness.json, report.html, report.md and robustness.png.

    Pairs that one of the models could not be attacked on, because they are too long for it or gold does not
    share their label, are left out for all. Raises ArtifactError for attacks that are not alike, DataError if
    no pair is left.

    Options:
        attacks: folders written by attack, of two models or more, all on the same pairs and by the same
            options  [required]
        output: folder to write; must not exist yet  [required]
        baseline: the model that the others are compared with (default: the first)
        confidence: coverage of intervals  [default: 0.95]
        resamples: bootstrap resamples  [default: 2000]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def publish(
    model: StrPath,
    evaluation: StrPath | None = None,
    *,
    output: StrPath,
    repo: str | None = None,
    push: bool = False,
    public: bool = False,
    license: str | None = None,
    datasets: Sequence[str] = [],
    base_model: str | None = None,
    endpoint: str | None = None,
    yes: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write the repository: model files (weights linked, not copied, where the disk allows), card and plots.

    Without `push` nothing is sent: results say what would be. With `push` and `yes` the repository is made if
    there is none, private unless `public`, and the files go up in one commit; with `push` alone nothing is
    sent or written, and the error says what would have been. Raises OptionError for that, for a bad or
    missing repo name, an endpoint with a password in it, and a public repository that was to be private;
    ArtifactError for a folder that no stage wrote as a model or that is not as it was written; HubError for
    what the hub refuses.

    Options:
        model: folder with a model, written by merge, train, upcycle or export  [required]
        evaluation: folder written by evaluate, for the card
        output: folder to write; must not exist yet  [required]
        repo: owner/name on the hub; without it only the card is written
        push: push; otherwise only write and show what would be pushed  [default: no]
        public: make the repository public  [default: no]
        license: licence id for the card (default: taken from the dense model)
        datasets: dataset ids for the card
        base_model: hub name of the dense model for the card
        endpoint: another hub's address (default: huggingface.co)
        yes: confirm the push; without it, push shows what would be sent  [default: no]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def compare(
    runs: Sequence[StrPath],
    *,
    output: StrPath,
    baseline: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Compare models over runs with different seeds; writes compare.json, compare.md, report.html and plots.

    Per model and measure (what evaluate calls main numbers): mean and standard deviation over seeds, and the
    difference to the baseline, paired by seed, with a t-interval over seeds. Per model its cost at inference:
    parameters, FLOPs and measured tokens per second. Runs of different recipes make groups, each compared in
    itself. Raises ArtifactError if a folder is no evaluation, a seed occurs twice in a group, or a model or
    measure lacks a seed; OptionError if the baseline is no model.

    Options:
        runs: runs, evaluations, or folders of these: one per seed  [required]
        output: folder to write; must not exist yet  [required]
        baseline: model that the others are compared with (default: control, or evaluate's own)
        confidence: coverage of intervals over seeds  [default: 0.95]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def prepare(
    train: StrPath | None = None,
    *,
    output: StrPath,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    validation: StrPath | None = None,
    fit: StrPath | None = None,
    tests: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = {},
    candidates: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = {},
    split_by: str | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.0,
    max_train: int | None = None,
    max_validation: int | None = None,
    max_test: int | None = None,
    max_prompts: int | None = None,
    tokenizer: StrPath | None = None,
    folds: int = 0,
    scored: bool = True,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Read, check, split and cap preference data; write it as gzip'd JSON lines in plain field names.

    Writes train, validation and fit .jsonl.gz (each only if there is one), tests/NAME.jsonl.gz,
    candidates/NAME.jsonl.gz, folds/N/train and held_out .jsonl.gz, and report.json with the row numbers of
    all bad rows. Lengths are checked if `tokenizer` is given. Values of `split_by` (else equal prompts) never
    straddle a split.
    Raises DataError for unusable data, OptionError if no data are named.

    Options:
        train: training pairs: file or hub name:split
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        validation: held-out pairs (default: split off train)
        fit: pairs for fitting coefficients (default: the validation pairs)
        tests: test pairs, a file per name
        candidates: scored candidates for best-of-n, a file per name
        split_by: row field, e.g. topic: rows with the same value stay in one split
        validation_share: share split off train for validation  [default: 0.1]
        test_share: share split off train as test set 'test'  [default: 0.0]
        max_train: largest number of training pairs; they are drawn at random
        max_validation: largest number of validation pairs; they are drawn at random
        max_test: largest number of pairs per test set; they are drawn at random
        max_prompts: largest number of prompts per candidate set; they are drawn at random
        tokenizer: model whose tokenizer measures max_length
        folds: parts of train for cross-fitting, by whole groups: folds/N/held_out, and all other parts
            as folds/N/train  [default: 0]
        scored: whether candidates must have gold scores  [default: yes]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def write_world(
    *,
    output: StrPath,
    train_pairs: int = 5000,
    validation_pairs: int = 600,
    test_pairs: int = 2000,
    own_pairs: int = 500,
    prompts: int = 100,
    candidates: int = 256,
    label_noise: float = 0.2,
    hidden_size: int = 64,
    num_layers: int = 3,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    r"""Write the world: a tiny untrained Llama reward model with its tokenizer, and data in every split.

    model/ loads with transformers' Auto classes. data/ is laid out as the stage data does it: train and
    validation .jsonl.gz with noisy labels, tests/in_distribution and tests/out_of_distribution with true
    ones, candidates/wide with gold scores; `subset` is the regime. For models trained apart there are
    regimes/NAME, the training pairs of one regime each, and own, pairs with true labels of all regimes but
    the last, which is left to what these models start from.

    Options:
        output: folder to write; must not exist yet  [required]
        train_pairs: training pairs  [default: 5000]
        validation_pairs: held-out pairs for early stopping and fitting  [default: 600]
        test_pairs: test pairs, in and out of distribution each  [default: 2000]
        own_pairs: pairs with true labels of three of the four regimes, to combine models trained apart
            [default: 500]
        prompts: prompts with candidate answers  [default: 100]
        candidates: answers per prompt for best-of-n  [default: 256]
        label_noise: share of flipped labels in training and validation pairs  [default: 0.2]
        hidden_size: width of the tiny Llama  [default: 64]
        num_layers: layers of the tiny Llama  [default: 3]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def audit(
    models: StrPath | Sequence[StrPath] | Mapping[str, StrPath],
    pairs: StrPath,
    *,
    output: StrPath,
    tell: Callable[[StepReport], None] | None = None,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    candidates: StrPath | None = None,
    max_pairs: int | None = 1000,
    attack_pairs: int = 200,
    steps: int = 6,
    proposals: int = 12,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> RunReport:
    r"""Measure how far reward models can be trusted, one or several on the same pairs.

    Accuracy and calibration, seven probes by edited answers, best-of-n where there are scored candidates, and
    an attack on each model: how many of its right verdicts fall to edits that leave the content as it was.
    Writes a run's folder with OUTPUT/report.html; steps that are done are not done again. Raises OptionError,
    ArtifactError if another run is at work there, and whatever the stages raise.

    Options:
        models: reward models: folders, hub names or scorer.json files  [required]
        pairs: preference pairs that the models were not trained on: file or hub name:split  [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        candidates: prompts with scored answers, for best-of-n: file or hub name:split
        max_pairs: largest number of pairs; they are drawn at random  [default: 1000]
        attack_pairs: largest number of pairs to attack  [default: 200]
        steps: attack: most edits per answer  [default: 6]
        proposals: attack: edits tried per step  [default: 12]
        confidence: coverage of intervals  [default: 0.95]
        resamples: bootstrap resamples  [default: 2000]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def combine(
    models: StrPath | Sequence[StrPath] | Mapping[str, StrPath],
    pairs: StrPath,
    *,
    output: StrPath,
    tell: Callable[[StepReport], None] | None = None,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    level: float = 0.05,
    confidence: float = 0.95,
    resamples: int = 2000,
    language_models: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = {},
    base: StrPath | None = None,
    split_by: str | None = None,
    folds: int = 3,
    tune: Literal["all", "merges", "none"] = "all",
    form: Literal["dense", "moe"] = "dense",
    epochs: float = 1.0,
    learning_rate: float = 1e-05,
    batch_size: int = 8,
    train_layers: str = "all",
    scale: float | None = None,
    granularity: Literal["global", "group", "layer", "matrix"] = "global",
    l2: float = 0.03,
    max_epochs: int = 10,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> RunReport:
    r"""Find the reward model to use, given several and some labelled pairs of one's own.

    Tries each model as it is, their average, the sum of their changes from `base`, a merge with fitted
    weights, and each of these trained on the pairs; every candidate is judged on pairs that it was not made
    from, and a simpler one is taken unless a costlier one is better beyond chance. Writes a run's folder: the
    winner, made from all pairs, as an ordinary checkpoint in OUTPUT/model, its card in OUTPUT/card, and
    OUTPUT/report.html. Steps that are done are not done again. Raises OptionError, ArtifactError if another
    run is at work there, and whatever the stages raise. Source: task arithmetic (arXiv 2212.04089), WARM
    (arXiv 2401.12187).

    Options:
        models: two reward models or more, of one architecture  [required]
        pairs: your own preference pairs, a few dozen at least: file or hub name:split  [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        level: significance level: a costlier candidate is taken only if it is better with p below this
            [default: 0.05]
        confidence: coverage of intervals  [default: 0.95]
        resamples: bootstrap resamples for the intervals  [default: 2000]
        language_models: with one reward model: language models of its base that know what it lacks;
            each is averaged into it, but for the head, with the weight that suits the pairs best
            (DogeRM)
        base: the model that all of them were trained from, with or without a reward head (default: the
            start that moemerge train recorded in all; without one, averages only, no sums)
        split_by: row field, e.g. topic: rows with the same value are held out together
        folds: parts of the pairs; each is held out in turn  [default: 3]
        tune: what is also tried after training on the pairs: all (models and merges), merges, or none
            (all, merges, none)  [default: all]
        form: moe: also try a mixture whose gate picks one model's MLPs by the prompt: the compute of
            one model, the memory of all (decoders only; loading it needs moemerge) (dense, moe)
            [default: dense]
        epochs: tuning: passes over the pairs  [default: 1.0]
        learning_rate: tuning: learning rate  [default: 1e-05]
        batch_size: tuning: pairs per step  [default: 8]
        train_layers: tuning: transformer layers that train, such as last:4  [default: all]
        scale: sum: total of the coefficients c (default: 2, so 2/M for each of M models)
        granularity: fitted coefficients: what shares one set of them (global, group, layer, matrix)
            [default: global]
        l2: fitted coefficients: L2 penalty on the distance to those of the sum  [default: 0.03]
        max_epochs: fitted coefficients: most passes over the pairs  [default: 10]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """

def patch(
    model: StrPath,
    pairs: StrPath,
    *,
    output: StrPath,
    tell: Callable[[StepReport], None] | None = None,
    fields: Mapping[str, str] = {},
    bad_rows: Literal["refuse", "skip"] = "refuse",
    max_length: int = 1024,
    gold_model: StrPath | None = None,
    gold_function: str | Callable[..., Any] | None = None,
    policy: StrPath | None = None,
    other_policy: StrPath | None = None,
    side: Literal["rejected", "chosen"] = "rejected",
    keep: float = 0.25,
    answers: int = 1,
    top: int = 5,
    guidance: float = 0.5,
    temperature: float = 0.6,
    formula: Literal["balanced", "reform"] = "balanced",
    max_new_tokens: int = 128,
    test: StrPath | None = None,
    test_share: float = 0.3,
    split_by: str | None = None,
    search: Literal["guided", "decode"] = "guided",
    unseen: Sequence[str] = ["flattery", "agreement", "bold", "bullets", "headings", "emoji"],
    rounds: int = 1,
    share: float = 0.05,
    epochs: float = 1.0,
    learning_rate: float = 1e-05,
    batch_size: int = 8,
    train_layers: str = "all",
    controls: bool = True,
    max_pairs: int = 200,
    steps: int = 6,
    proposals: int = 12,
    words: Sequence[str] = [],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> RunReport:
    r"""Make a reward model hold better against edits that raise its score, and measure whether it does.

    The model is attacked on its training pairs, and trained on for `rounds` rounds with a share of the
    answers found: edited ones, or with search decode written by a language model. Each edit is also made to a
    chosen answer, so that being edited is no sign of being worse. Before and after it is attacked on other
    pairs, by the patch's own kind of attack and by edits that no patch has, and so are two rivals of as many
    steps: trained on ordinary pairs, and on pairs edited at random or written without guidance. Writes a
    run's folder: the model in OUTPUT/round-N/patched, its card in OUTPUT/card, and OUTPUT/report.html. Steps
    that are done are not done again. Where no attack succeeds there is nothing to patch, and the page says
    so. Raises OptionError, ArtifactError if another run is at work there, and whatever the stages raise.
    Source: REFORM (arXiv 2507.06419).

    Options:
        model: reward model: folder or hub name  [required]
        pairs: pairs to attack and to train on: file or hub name:split  [required]
        output: folder to write; must not exist yet  [required]
        fields: other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, score
        bad_rows: what to do with broken rows; either way they are counted and reported (refuse, skip)
            [default: refuse]
        max_length: longest prompt + answer in tokens; longer ones are bad rows  [default: 1024]
        gold_model: reward model, or a scorer.json, whose scores are gold
        gold_function: FILE.py:NAME or MODULE:NAME, a function of prompt and answer that gives the gold
            score
        policy: search decode: language model that writes the answers; ideally one that was trained to
            write answers of the side that is attacked
        other_policy: search decode, in place of gold: language model of the other side's answers; a new
            answer stays on its side while policy finds it more likely than this model does
        side: search decode: rejected: bad answers that score above the chosen one; chosen: good answers
            that score below the rejected one (rejected, chosen)  [default: rejected]
        keep: search decode: share of the original answer's words that each new answer starts with
            [default: 0.25]
        answers: search decode: new answers per pair  [default: 1]
        top: search decode: number of most likely tokens among which the reward model chooses  [default:
            5]
        guidance: search decode: weight of the reward model against the policy; 0: the policy alone, the
            control for guidance  [default: 0.5]
        temperature: search decode: sampling temperature  [default: 0.6]
        formula: search decode: balanced: log-probabilities and standardised scores, weighted by
            guidance; reform: sum of two softmaxes, as in REFORM's code, without guidance (balanced,
            reform)  [default: balanced]
        max_new_tokens: search decode: most new tokens per answer; longer answers are cut  [default:
            128]
        test: other pairs, to measure the patch on (default: a share of pairs)
        test_share: without test: share of the prompts held out for it  [default: 0.3]
        split_by: row field, e.g. topic: rows with the same value stay on one side of the split
        search: what the patch is made of: guided: answers edited under the guidance of the model's
            score; decode: answers that a language model writes under that guidance (guided, decode)
            [default: guided]
        unseen: edits kept out of every patch, to see whether it helps against more than it was made of
            [default: flattery, agreement, bold, bullets, headings, emoji]
        rounds: attacks and trainings, each on the model of the last  [default: 1]
        share: share of the training pairs that come from the patch  [default: 0.05]
        epochs: passes over the pairs per round  [default: 1.0]
        learning_rate: learning rate  [default: 1e-05]
        batch_size: pairs per step  [default: 8]
        train_layers: transformer layers that train, such as last:4  [default: all]
        controls: train two rivals for as many steps: on ordinary pairs alone, and with as many pairs
            whose edits are random (of decode: that were written without guidance)  [default: yes]
        max_pairs: largest number of pairs to attack, drawn at random  [default: 200]
        steps: attack: most edits per answer  [default: 6]
        proposals: attack: edits tried per step  [default: 12]
        words: attack: words that insert_word adds
        confidence: coverage of intervals  [default: 0.95]
        resamples: bootstrap resamples  [default: 2000]
        seed: seed of every random draw  [default: 0]
        threads: CPU threads (default: leave as it is)
        device: auto, cpu, cuda, cuda:N  [default: auto]
        overwrite: replace an existing output once the new one is whole  [default: no]
    """
