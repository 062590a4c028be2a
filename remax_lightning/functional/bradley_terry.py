"""The loss of a reward model that learns from pairs of responses, with an explicit normalizer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remax_lightning.functional._checks import check_argument, check_shape, compute_dtype
from remax_lightning.functional.masking import safe_divide


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    normalizer: Tensor | float,
    margin: Tensor | float = 0.0,
    centering_coef: float = 0.0,
) -> Tensor:
    """Return `Σ [-logsigmoid(chosen - rejected - margin) + centering_coef · (chosen + rejected)²] / normalizer`.

    The first term is the negative log-likelihood of the preferences under the model of Bradley and Terry (1952), as
    Ouyang et al. (2022, arXiv 2203.02155, equation 1) train on one pair; the margin is that of Llama 2 (Touvron et al.
    2023, arXiv 2307.09288, equation 2). The likelihood does not see a constant added to all scores; the second term
    (Eisenstein et al. 2023, arXiv 2312.09244, section 2) holds them around 0.

    Args:
        chosen: `[B]` scores of the chosen responses.
        rejected: `[B]` scores of the rejected responses.
        normalizer: what the sum is divided by, such as the number of pairs.
        margin: `[B]` or one number, what a chosen response has to be ahead by; in units of the score.
        centering_coef: weight of the second term, 0 or more.

    Returns:
        scalar float32 (float64 if an input is), differentiable.

    Raises:
        ValueError: if the shapes differ or `centering_coef` is below 0.
    """
    check_shape("chosen", chosen, "[B]", (None,))
    check_shape("rejected", rejected, "[B]", chosen.shape)
    if isinstance(margin, Tensor):
        check_shape("margin", margin, "[B]", chosen.shape)
    check_argument(centering_coef >= 0, "centering_coef", "0 or more", centering_coef)
    dtype = compute_dtype(chosen, rejected)
    chosen, rejected = chosen.to(dtype), rejected.to(dtype)
    margin = torch.as_tensor(margin, dtype=dtype, device=chosen.device)
    losses = -F.logsigmoid(chosen - rejected - margin) + centering_coef * (chosen + rejected) ** 2
    return safe_divide(losses.sum(), normalizer)
