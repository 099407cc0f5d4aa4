"""Keys of TRL's own training arguments: which of them a recipe may set, and what the others are here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# TRL's keys that an option stands for.
OPTION_OF = {
    "output_dir": "output",
    "seed": "seed",
    "data_seed": "seed",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "bf16": "precision",
    "fp16": "precision",
    "bf16_full_eval": "precision",
    "fp16_full_eval": "precision",
    "use_cpu": "device",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing",
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "group_by_length",
    "eval_strategy": "validation",
    "load_best_model_at_end": "validation",
    "eval_steps": "eval_steps",
    "save_steps": "eval_steps",
    "metric_for_best_model": "choose_by",
    "greater_is_better": "choose_by",
    "label_smoothing_factor": "label_smoothing",
    "center_rewards_coefficient": "center",
    "max_length": "max_length",
    "trust_remote_code": "trust_remote_code",
}
# What training here rests on; set otherwise, it would be wrong or in vain.
EVALUATION = "pairs are evaluated, each once, by moemerge itself"
RESUME = "a run that was killed goes on from moemerge's own checkpoints, bit for bit"
DATA = "texts are read and encoded by moemerge, as for every stage"
PROCESSES = "what several processes share, and how, is moemerge's: whole weights in each, or parts (sharded)"
PUBLISHED = "moemerge publish pushes what was trained"
FIXED = {
    **dict.fromkeys(
        (
            "eval_delay",
            "per_device_eval_batch_size",
            "prediction_loss_only",
            "eval_on_start",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "include_for_metrics",
            "batch_eval_metrics",
            "do_train",
            "do_eval",
            "do_predict",
        ),
        EVALUATION,
    ),
    **dict.fromkeys(
        (
            "save_strategy",
            "save_total_limit",
            "save_only_model",
            "save_on_each_node",
            "enable_jit_checkpoint",
            "logging_strategy",
            "logging_steps",
            "ignore_data_skip",
            "restore_callback_states_from_checkpoint",
            "resume_from_checkpoint",
            "auto_find_batch_size",
            "include_num_input_tokens_seen",
        ),
        RESUME,
    ),
    **dict.fromkeys(
        (
            "remove_unused_columns",
            "label_names",
            "model_init_kwargs",
            "chat_template_path",
            "dataset_num_proc",
            "eos_token",
            "pad_token",
            "pad_to_multiple_of",
        ),
        DATA,
    ),
    **dict.fromkeys(
        (
            "deepspeed",
            "fsdp",
            "fsdp_config",
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "ddp_backend",
            "ddp_timeout",
            "parallelism_config",
            "accelerator_config",
            "local_rank",
            "log_on_each_node",
            "log_level_replica",
            "average_tokens_across_devices",
        ),
        PROCESSES,
    ),
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        PUBLISHED,
    ),
}
# Keys on which nothing depends that training writes.
OF_REPORTS = {
    "report_to",
    "run_name",
    "project",
    "disable_tqdm",
    "log_level",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
}


def own_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """`keys` of TRL's, if none is moemerge's to set. Whether TRL has them is seen where it is imported."""
    for key, value in keys.items():
        if key in OPTION_OF:
            raise ValueError(f"keys that no option stands for; {key} is the option {OPTION_OF[key]}")
        if key in FIXED:
            raise ValueError(f"keys that may be set; not {key}: {FIXED[key]}")
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ValueError(f"values that JSON can hold, for {key} too") from None
    return keys


def deciding_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keys on which it depends what training writes."""
    return {key: value for key, value in keys.items() if key not in OF_REPORTS}
