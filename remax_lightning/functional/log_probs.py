"""Log-probs of tokens, and entropy and KL of their distributions.

They are computed from logits, or from hidden states and the output head. The latter computes the logits of a few tokens
at a time, also in the backward pass, so that no tensor of all tokens times the vocabulary exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from remax_lightning.functional.masking import check_argument, check_shape, compute_dtype

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


def mask_logits(logits: Tensor, ids: Tensor, sampling_mask: SamplingMask, rows: slice) -> Tensor:
    """Return `[m, V]` logits with minus infinity on the tokens that `sampling_mask` leaves out; never on `ids`, `[m]`.

    A sampled token may be outside of the mask after rounding or an update; its log-prob must stay finite.
    """
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

    def log_softmax(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs of all tokens, minus infinity for those left out, and the derivative of the soft cap."""
        logits = F.linear(hidden.to(self.product_dtype), weight, bias).to(self.dtype)  # [M, V]
        # In place from here on: [M, V] is the largest tensor of a training pass.
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        if self.temperature != 1:
            logits.div_(self.temperature)
        masked = logits if self.sampling_mask is None else mask_logits(logits, ids, self.sampling_mask, rows)
        log_probs = torch.log_softmax(masked, dim=-1)
        if self.soft_cap is None:
            return log_probs, None
        # x = cap * tanh(z / cap) has the slope dx/dz = 1 - (x / cap)^2, and `logits` are x / temperature.
        return log_probs, logits.mul_(self.temperature / self.soft_cap).square_().neg_().add_(1)

    def product_gradient(self, gradient: Tensor, slope: Tensor | None) -> Tensor:
        """Return the gradient of the matrix product from that of the log-softmax input, in place."""
        if slope is not None:
            gradient.mul_(slope)
        factor = self.scale / self.temperature
        return (gradient if factor == 1 else gradient.mul_(factor)).to(self.product_dtype)


LOGITS_AT_ONCE = 2**24
"""Default number of logits that exist at once: 64 MiB in float32, 128 tokens of a vocabulary of 131,072. A pass needs
two to three tensors of this size besides its inputs and gradients; on CUDA top-p needs about eight more."""


class TokenStatistics(NamedTuple):
    """Statistics of tokens under a model, `[M]`, or `[S, R]` for each token of responses.

    Args:
        log_probs: log-probs of the given tokens in nats, differentiable.
        entropy: entropy of the distribution at that position in nats, detached; None where it was not asked for.
        kl: KL(policy || reference) over the vocabulary at that position in nats, differentiable; None without a
            reference.
        squared_norm: squared norm of the gradient of the log-prob at its logits, detached: `1 - 2 π(y_t) + Σ_v π(v)²`,
            0 where the policy is sure of its token; None where it was not asked for.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None
    squared_norm: Tensor | None = None


def token_statistics(
    logits: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    sampling_mask: SamplingMask | None = None,
    *,
    entropy: bool = True,
    squared_norm: bool = False,
) -> TokenStatistics:
    """Return log-probs of `ids` and entropies, of the softmax of `logits / temperature`.

    Args:
        logits: `[S, R, V]`, those that predict `ids` (already shifted).
        ids: `[S, R]` token ids.
        temperature: divides the logits; the one that sampled keeps the gradient on-policy.
        sampling_mask: says which tokens the softmax is over, `ids` always among them; None for all. A constant to the
            gradient.
        entropy: whether entropies are computed, which reads all probabilities.
        squared_norm: whether squared norms are, which does so once more.

    Returns:
        each `[S, R]` float32 (float64 for float64 logits).

    Raises:
        ValueError: if the shapes do not fit or `temperature` is not above 0.
    """
    check_shape("logits", logits, "[S, R, V]", (None, None, None))
    check_shape("ids", ids, "[S, R]", logits.shape[:2])
    check_argument(temperature > 0, "temperature", "above 0", temperature)
    ids = ids.long()
    scaled_logits = (logits.to(compute_dtype(logits)) / temperature).flatten(0, 1)  # [S * R, V]
    if sampling_mask is not None:
        scaled_logits = mask_logits(scaled_logits, ids.flatten(), sampling_mask, slice(None))
    log_softmax = torch.log_softmax(scaled_logits, dim=-1).view(logits.shape)
    log_probs = log_softmax.gather(-1, ids.unsqueeze(-1)).squeeze(-1)  # log pi(y_t) [S, R]
    entropies = norms = None
    if entropy or squared_norm:
        with torch.no_grad():
            probs = log_softmax.exp()  # [S, R, V]
            norms = _squared_norm(log_probs, probs) if squared_norm else None
            # entr(0) = 0, where p * log p is NaN: logits of -inf are allowed.
            entropies = torch.special.entr(probs).sum(dim=-1) if entropy else None
    return TokenStatistics(log_probs, entropies, squared_norm=norms)


def _squared_norm(log_probs: Tensor, probs: Tensor) -> Tensor:
    """Return `|onehot(y) - π|²` at every position, from `log π(y)` and `π`."""
    # Without a square of the size of the vocabulary. Rounding may make a difference of equal numbers negative.
    squared: Tensor = torch.linalg.vector_norm(probs, dim=-1).square()
    return (1 - 2 * log_probs.exp() + squared).clamp_min(0.0)


def hidden_statistics(
    hidden: Tensor,
    head: OutputHead,
    ids: Tensor,
    temperature: float = 1.0,
    *,
    reference: tuple[Tensor, OutputHead] | None = None,
    sampling_mask: SamplingMask | None = None,
    reference_mask: SamplingMask | None = None,
    entropy: bool = True,
    squared_norm: bool = False,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> TokenStatistics:
    """Return the same as `token_statistics`, and the KL to a reference, without a tensor of all logits.

    Forward and backward compute the logits of as many tokens as `logits_at_once` allows and free them again, which
    costs a third matrix product in the backward pass. If all logits fit, their log-probs are saved instead. Logits are
    computed in the dtype of the weight (or of autocast), as in the model, and everything else in float32.

    Args:
        hidden: `[M, D]` final hidden states, those that predict `ids`.
        head: computes logits from them.
        ids: `[M]` token ids.
        temperature: divides the logits, also those of the reference, after scale and soft cap.
        reference: `[M, D']` final hidden states of the reference for the same tokens, and its head; gets no gradient.
        sampling_mask: says which tokens the policy's distribution is over, `ids` always among them; None for all. A
            constant to the gradient.
        reference_mask: the same of the reference. The KL is finite only if it keeps every token that `sampling_mask`
            keeps, so truncation does not belong here.
        entropy: whether entropies are computed, as in `token_statistics`.
        squared_norm: whether squared norms are.
        logits_at_once: maximum of tokens times vocabulary; at least one token is processed.

    Returns:
        `[M]` float32 (float64 for float64), differentiable in `hidden`, `head.weight` and `head.bias`.

    Raises:
        ValueError: if the shapes do not fit, or `temperature` or `logits_at_once` is not above 0.
    """
    check_shape("hidden", hidden, "[M, D]", (None, head.weight.shape[1]))
    check_shape("ids", ids, "[M]", hidden.shape[:1])
    check_argument(temperature > 0, "temperature", "above 0", temperature)
    check_argument(logits_at_once > 0, "logits_at_once", "above 0", logits_at_once)
    vocabulary, dtype = head.weight.shape[0], compute_dtype(hidden, head.weight)
    # ---- The reference's tensors, without gradient ----
    reference_inputs: tuple[Any, ...] = (None, None, None, None)  # hidden, weight, bias, transform
    if reference is not None:
        reference_hidden, reference_head = reference
        check_shape("the reference's weight", reference_head.weight, "[V, D']", (vocabulary, None))
        check_shape(
            "the reference's hidden", reference_hidden, "[M, D']", (hidden.shape[0], reference_head.weight.shape[1])
        )
        tensors = (
            None if x is None else x.detach() for x in (reference_hidden, reference_head.weight, reference_head.bias)
        )
        reference_inputs = (*tensors, LogitTransform.from_head(reference_head, temperature, dtype, reference_mask))
    # ---- `rows` tokens at a time ----
    transform, rows = LogitTransform.from_head(head, temperature, dtype, sampling_mask), logits_at_once // vocabulary
    # Tensors are passed one by one, because autograd does not look for them inside of tuples.
    apply = cast(Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]], _HiddenStatistics.apply)
    arguments = hidden, head.weight, head.bias, transform, *reference_inputs, ids.long()
    return TokenStatistics(*apply(*arguments, max(1, rows), entropy, squared_norm))


class _HiddenStatistics(torch.autograd.Function):
    """Log-prob, entropy and, with a reference, KL per token; backward recomputes logits that did not fit at once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        reference_hidden: Tensor | None,
        reference_weight: Tensor | None,
        reference_bias: Tensor | None,
        reference_transform: LogitTransform | None,
        ids: Tensor,
        rows: int,
        needs_entropy: bool,
        needs_norm: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        log_probs = hidden.new_zeros(len(hidden), dtype=transform.dtype)
        entropy = torch.zeros_like(log_probs) if needs_entropy else None
        squared_norm = torch.zeros_like(log_probs) if needs_norm else None
        kl, saved_log_softmax = None if reference_hidden is None else torch.zeros_like(log_probs), None
        # Where all tokens fit into one chunk, the backward pass reads the saved log-probs and needs no second product.
        # A soft cap excludes that, since its slope would have to be saved too.
        keep = len(hidden) <= rows and transform.soft_cap is None and any(ctx.needs_input_grad)
        # `transform` says which dtype each operation has; autocast would choose others.
        with torch.autocast(hidden.device.type, enabled=False):
            head, reference_logits = transform.cast_weights(weight, bias), None
            if reference_hidden is not None:
                reference_logits = _ReferenceLogits.from_tensors(
                    reference_hidden, reference_weight, reference_bias, reference_transform
                )
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                log_softmax = transform.log_softmax(hidden[part], *head, ids[part], part)[0]  # [rows, V]
                log_probs[part] = log_softmax.gather(-1, ids[part, None]).squeeze(-1)
                if reference_logits is not None and kl is not None:
                    # KL_t = sum_v pi(v) (log pi(v) - log pi_ref(v))
                    kl[part] = reference_logits.log_ratio(log_softmax, ids[part], part).mul_(log_softmax.exp()).sum(-1)
                if entropy is not None or squared_norm is not None:
                    probs = log_softmax.exp()  # [rows, V]
                    if squared_norm is not None:
                        squared_norm[part] = _squared_norm(log_probs[part], probs)
                    if entropy is not None:
                        # Impossible tokens have no entropy; 0 * -inf would be NaN.
                        entropy[part] = -probs.mul_(log_softmax.clamp_min_(torch.finfo(transform.dtype).min)).sum(-1)
                    del probs
                # Clamped perhaps, from -inf to the least number: its exp is 0 still, and `log_ratio` knows both.
                saved_log_softmax = log_softmax if keep else None
                del log_softmax  # free it before the next chunk
        ctx.transform, ctx.reference_transform, ctx.rows = transform, reference_transform, rows
        ctx.save_for_backward(
            hidden, weight, bias, reference_hidden, reference_weight, reference_bias, ids, kl, saved_log_softmax
        )
        ctx.mark_non_differentiable(*(value for value in (entropy, squared_norm) if value is not None))
        ctx.set_materialize_grads(False)  # an output without use has the gradient None, not zeros
        return log_probs, entropy, kl, squared_norm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, _: None, grad_kl: Tensor | None, __: None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, reference_hidden, reference_weight, reference_bias, ids, kl, saved_log_softmax = (
            ctx.saved_tensors
        )
        transform: LogitTransform = ctx.transform
        gradient_sums = _GradientSums(hidden, weight, bias, ctx.needs_input_grad, transform.dtype)
        if grad_log_probs is None:
            grad_log_probs = hidden.new_zeros(len(hidden), dtype=transform.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            head, reference_logits = transform.cast_weights(weight, bias), None
            if grad_kl is not None:
                reference_logits = _ReferenceLogits.from_tensors(
                    reference_hidden, reference_weight, reference_bias, ctx.reference_transform
                )
            for start in range(0, len(hidden), ctx.rows):
                part = slice(start, start + ctx.rows)
                log_softmax, slope = (
                    (saved_log_softmax, None)
                    if saved_log_softmax is not None
                    else transform.log_softmax(hidden[part], *head, ids[part], part)
                )
                # ---- The gradient of the logits: grad * (onehot - p), plus grad_kl * p * (log_ratio - kl) ----
                weights = -grad_log_probs[part, None]  # [rows, 1]
                if reference_logits is not None and grad_kl is not None:
                    weights = (
                        reference_logits.log_ratio(log_softmax, ids[part], part)
                        .sub_(kl[part, None])
                        .mul_(grad_kl[part, None])
                        .add_(weights)
                    )
                gradient = (log_softmax.exp_() if saved_log_softmax is None else log_softmax.exp()).mul_(weights)
                gradient.scatter_add_(-1, ids[part, None], grad_log_probs[part, None])
                product = transform.product_gradient(gradient, slope)  # [rows, V], of the matrix product
                del log_softmax, slope, weights, gradient  # free them before the next product
                gradient_sums.add(part, product, head[0])
                del product
        return (*gradient_sums.gradients(), *9 * [None])  # transform, the reference's four, ids, rows, what is needed


class _ReferenceLogits(NamedTuple):
    """The log-probs of the reference in a KL."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform

    @classmethod
    def from_tensors(
        cls, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, transform: LogitTransform | None
    ) -> _ReferenceLogits | None:
        if hidden is None or weight is None or transform is None:
            return None
        return cls(hidden, *transform.cast_weights(weight, bias), transform)

    def log_ratio(self, policy_log_probs: Tensor, ids: Tensor, rows: slice) -> Tensor:
        """Return `policy_log_probs` minus the reference's, 0 where the policy's are -inf; a new tensor."""
        reference_log_probs, _ = self.transform.log_softmax(self.hidden[rows], self.weight, self.bias, ids, rows)
        # Tokens that the policy cannot draw add nothing to the KL; of two -inf the difference would be NaN.
        left_out = policy_log_probs <= torch.finfo(policy_log_probs.dtype).min  # [rows, V]
        return reference_log_probs.neg_().add_(policy_log_probs).masked_fill_(left_out, 0.0)


class _GradientSums:
    """Sums of the requested gradients over the chunks, in float32 also for a 16-bit weight."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...], dtype: torch.dtype
    ) -> None:
        self.inputs = hidden, weight, bias
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needed[2] else None

    def add(self, rows: slice, gradient: Tensor, weight: Tensor) -> None:
        """Add the contribution of the `[rows, V]` gradient of the matrix product with `weight`."""
        if self.hidden is not None:
            self.hidden[rows] = (gradient @ weight).to(self.hidden.dtype)
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        if self.weight is not None:
            hidden = self.inputs[0][rows].to(gradient.dtype)
            # Without a temporary of [V, D] where dtypes agree. A product of 16 bits is summed up in float32.
            if gradient.dtype == self.weight.dtype:
                self.weight.addmm_(gradient.T, hidden)
            else:
                self.weight += gradient.T @ hidden

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias in their dtypes."""
        leaves = zip((self.hidden, self.weight, self.bias), self.inputs, strict=True)
        return tuple(
            None if gradient is None or tensor is None else gradient.to(tensor.dtype) for gradient, tensor in leaves
        )
