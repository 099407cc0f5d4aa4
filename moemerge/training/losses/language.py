"""The language loss: chosen answers are to stay likely. Shapes: B pairs in a batch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from moemerge.training.losses.base import Batch, Course, Loss


def language(course: Course) -> Loss:
    """-log pi(chosen | prompt), a mean over answer tokens, through a language head on the trunk.

    With options.language_form `sigmoid` it is GRM's own term, -log sigmoid(t log pi(chosen | prompt)) with a
    sum over tokens and t = options.policy_temperature. The rejected answer plays no part.
    Raises as Course.language_head.
    Source: Regularizing Hidden States (GRM, arXiv 2406.10216), the SFT regularisation.
    """
    head, options = course.language_head, course.options

    def of(batch: Batch) -> Tensor:
        assert batch.states_2BTD is not None
        read = (batch.states_2BTD, batch.ids_2BT, batch.mask_2BT, batch.prompts_2B)
        log_B, count_B = head.answers(*(tensor.chunk(2)[0] for tensor in read))
        if options.language_form == "sigmoid":
            return -logsigmoid(options.policy_temperature * log_B)
        return -log_B / count_B.clamp(min=1)

    return Loss(of, states=True)
