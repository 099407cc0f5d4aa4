"""The policy loss: DPO on the pairs, through a language head on the trunk. Shapes: P pairs, B in a batch."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moemerge.data.tokenise import texts_of
from moemerge.errors import CheckpointError
from moemerge.models.pooling import last_states
from moemerge.models.scoring import batches, collate, gates_by_prompt
from moemerge.training.losses.base import Batch, Course, Loss

BATCH_TOKENS = 8192

log = logging.getLogger(__name__)


def policy(course: Course) -> Loss:
    """-log sigmoid(t (log pi(c) - log pi(r) - log pi_0(c) + log pi_0(r))), t = options.policy_temperature.

    pi is the language model that the trunk and its language head make, c and r are chosen and rejected, whose
    log-probabilities are sums over answer tokens; pi_0 is pi as it is before the first step, computed once
    and kept for a run that goes on after a kill.
    Raises as Course.language_head, and CheckpointError if pi_0 is not finite.
    Source: HAF-RM (arXiv 2407.04185), the policy loss; DPO (arXiv 2305.18290), equation 7.
    """
    head, temperature = course.language_head, course.options.policy_temperature
    reference_P = torch.tensor(course.kept("reference", lambda: _log_odds(course)), dtype=torch.float64)

    def of(batch: Batch) -> Tensor:
        assert batch.states_2BTD is not None
        log_2B, _ = head.answers(batch.states_2BTD, batch.ids_2BT, batch.mask_2BT, batch.prompts_2B)
        chosen_B, rejected_B = log_2B.chunk(2)
        reference_B = reference_P[batch.places_B.cpu()].to(log_2B.device, log_2B.dtype)
        return -logsigmoid(temperature * (chosen_B - rejected_B - reference_B))

    return Loss(of, states=True)


@torch.no_grad()
def _log_odds(course: Course) -> list[float]:
    """log pi(chosen) - log pi(rejected) of each training pair, by the model as it stands."""
    model, texts = course.model.eval(), texts_of(course.pairs)
    log.info("policy: log-probabilities of %d texts before training", len(texts))
    log_N = torch.zeros(len(texts), dtype=torch.float64)
    with course.autocast():
        for rows in batches([len(text.ids) for text in texts], BATCH_TOKENS):
            inputs = collate([texts[row] for row in rows], course.pad, True, model.device)
            prompts_B = inputs["prompt_lengths"]
            if not gates_by_prompt(model):
                del inputs["prompt_lengths"]
            with last_states(model) as states:
                model(**inputs, use_cache=False)
            read = (states[0], inputs["input_ids"], inputs["attention_mask"], prompts_B)
            log_N[rows] = course.language_head.answers(*read)[0].double().cpu()
    if not log_N.isfinite().all():
        raise CheckpointError(
            "the language head gives log-probabilities that are not finite",
            given=f"{int((~log_N.isfinite()).sum())} of {len(texts)} texts",
            expected="finite numbers",
            fix="check the model and its language head for NaN, or set precision to float32",
        )
    return (log_N[0::2] - log_N[1::2]).tolist()
