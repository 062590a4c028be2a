"""From hidden states to logits, and the mask of the sampled distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

SamplingMask: TypeAlias = Callable[[Tensor, slice], Tensor]
"""Maps `[m, V]` logits over the temperature, and the slice of the `M` positions that they belong to, to a bool mask of
their shape: True on the tokens that can be drawn there."""


class OutputHead(NamedTuple):
    """How a model computes its logits: `x = scale * (weight @ hidden + bias)`, then `cap * tanh(x / cap)`.

    Args:
        weight: `[V, D]` output embedding.
        bias: `[V]`, or None.
        scale: factor of the logits (Cohere multiplies them, Granite divides).
        soft_cap: bound that the logits approach (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None


def mask_logits(logits: Tensor, ids: Tensor, sampling_mask: SamplingMask | None, rows: slice) -> Tensor:
    """Return `[m, V]` logits with minus infinity on the tokens that `sampling_mask` leaves out; never on `ids`, `[m]`.

    A sampled token may be outside of the mask after rounding or an update; its log-prob must stay finite.
    """
    if sampling_mask is None:
        return logits
    allowed = sampling_mask(logits.detach(), rows).scatter(-1, ids[:, None], True)  # [m, V]
    return logits.masked_fill(allowed.logical_not_(), -torch.inf)


class LogitTransform(NamedTuple):
    """The settings of the computation from hidden states to logits that are not tensors."""

    scale: float
    soft_cap: float | None
    temperature: float
    product_dtype: torch.dtype
    dtype: torch.dtype
    sampling_mask: SamplingMask | None = None

    @classmethod
    def from_head(
        cls, head: OutputHead, temperature: float, dtype: torch.dtype, sampling_mask: SamplingMask | None = None
    ) -> LogitTransform:
        """Return the transform of a head, with the product in the dtype of autocast."""
        product_dtype, device = head.weight.dtype, head.weight.device.type
        if product_dtype != torch.float64 and torch.is_autocast_enabled(device):
            product_dtype = torch.get_autocast_dtype(device)
        return cls(head.scale, head.soft_cap, temperature, product_dtype, dtype, sampling_mask)

    def cast_weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in the dtype of the product."""
        return weight.to(self.product_dtype), None if bias is None else bias.to(self.product_dtype)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return logits divided by the temperature, as a new tensor."""
        logits = F.linear(hidden.to(self.product_dtype), weight, bias).to(self.dtype)  # [M, V]
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def log_softmax(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs of all tokens, minus infinity for those left out, and the derivative of the soft cap."""
        logits = self.logits(hidden, weight, bias)
        log_probs = torch.log_softmax(mask_logits(logits, ids, self.sampling_mask, rows), dim=-1)
        if self.soft_cap is None:
            return log_probs, None
        return log_probs, logits.mul_(self.temperature / self.soft_cap).square_().neg_().add_(1)

    def product_gradient(self, gradient: Tensor, slope: Tensor | None) -> Tensor:
        """Return the gradient of the matrix product from that of the log-softmax input, in place."""
        if slope is not None:
            gradient.mul_(slope)
        factor = self.scale / self.temperature
        return (gradient if factor == 1 else gradient.mul_(factor)).to(self.product_dtype)
