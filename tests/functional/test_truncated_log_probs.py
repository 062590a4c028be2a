"""Log-probs, entropy and KL of a distribution over the kept tokens alone, against loops in double precision."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from remax_lightning.functional import OutputHead, TokenStatistics, hidden_statistics, token_statistics

TOKENS, VOCABULARY = 9, 11
HEADS = {"plain": (False, 1.0, None), "everything": (True, 1.7, 3.0)}


class Case(NamedTuple):
    hidden: Tensor
    head: OutputHead
    ids: Tensor
    other: Tensor
    other_head: OutputHead


def make_case(kind: str, dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> Case:
    generator = torch.Generator().manual_seed(5)
    with_bias, scale, cap = HEADS[kind]
    shapes = (tokens, 5), (VOCABULARY, 5), (VOCABULARY,), (tokens, 4), (VOCABULARY, 4)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    hidden, weight, bias = (tensor.requires_grad_() for tensor in tensors[:3])
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    head = OutputHead(weight, bias if with_bias else None, scale, cap)
    return Case(hidden, head, ids, tensors[3], OutputHead(tensors[4], None, 0.8, None))


def above_the_mean(logits: Tensor, _: slice) -> Tensor:
    """A way to choose tokens that is easily said in a loop."""
    return logits >= logits.mean(-1, keepdim=True)


def statistics(case: Case, logits_at_once: int = 10**6) -> TokenStatistics:
    reference = case.other, case.other_head
    return hidden_statistics(
        case.hidden,
        case.head,
        case.ids,
        0.7,
        reference=reference,
        sampling_mask=above_the_mean,
        logits_at_once=logits_at_once,
    )


def logit_rows(hidden: Tensor, head: OutputHead, temperature: float) -> list[list[float]]:
    bias = [0.0] * VOCABULARY if head.bias is None else head.bias.tolist()
    found = []
    for state in hidden.tolist():
        row = []
        for weight, shift in zip(head.weight.tolist(), bias, strict=True):
            logit = head.scale * (math.fsum(a * b for a, b in zip(state, weight, strict=True)) + shift)
            row.append(logit if head.soft_cap is None else head.soft_cap * math.tanh(logit / head.soft_cap))
        found.append([logit / temperature for logit in row])
    return found


def oracle(logits: list[float], other: list[float], token: int) -> tuple[float, float, float, list[int]]:
    """Log-prob of `token`, entropy, KL and the tokens that are kept."""
    kept = [v for v, logit in enumerate(logits) if logit >= sum(logits) / len(logits) or v == token]
    total = math.log(math.fsum(math.exp(logits[v]) for v in kept))
    total_other = math.log(math.fsum(map(math.exp, other)))
    own = {v: logits[v] - total for v in kept}
    entropy = -math.fsum(math.exp(value) * value for value in own.values())
    kl = math.fsum(math.exp(own[v]) * (own[v] - (other[v] - total_other)) for v in kept)
    return own[token], entropy, kl, kept


@pytest.mark.parametrize("logits_at_once", [1, 22, 10**6])
@pytest.mark.parametrize("kind", HEADS)
def test_statistics_are_of_the_kept_tokens(kind: str, logits_at_once: int) -> None:
    case = make_case(kind)
    found = statistics(case, logits_at_once)
    own, other = logit_rows(case.hidden, case.head, 0.7), logit_rows(case.other, case.other_head, 0.7)
    from_logits = token_statistics(
        torch.tensor([own], dtype=torch.float64), case.ids[None], sampling_mask=above_the_mean
    )
    added = 0
    for m, token in enumerate(case.ids.tolist()):
        log_prob, entropy, kl, kept = oracle(own[m], other[m], token)
        assert len(kept) < VOCABULARY
        added += own[m][token] < sum(own[m]) / VOCABULARY
        assert found.log_probs[m].item() == pytest.approx(log_prob, rel=1e-12)
        assert found.entropy[m].item() == pytest.approx(entropy, rel=1e-12)
        assert found.kl[m].item() == pytest.approx(kl, rel=1e-11)
        assert from_logits.log_probs[0, m].item() == pytest.approx(log_prob, rel=1e-12)
        assert from_logits.entropy[0, m].item() == pytest.approx(entropy, rel=1e-12)
    assert 0 < added < TOKENS  # some of the given tokens would not have been kept


def test_the_kl_is_what_the_drawn_tokens_estimate() -> None:
    case = make_case("plain")
    own, other = logit_rows(case.hidden, case.head, 0.7), logit_rows(case.other, case.other_head, 0.7)
    case = case._replace(ids=torch.tensor([max(range(VOCABULARY), key=row.__getitem__) for row in own]))
    expected = statistics(case).kl.tolist()
    reference = torch.tensor(other, dtype=torch.float64).log_softmax(-1)
    estimates = [0.0] * TOKENS
    for v in range(VOCABULARY):
        log_probs = statistics(case._replace(ids=torch.full((TOKENS,), v))).log_probs
        for m, row in enumerate(own):
            if row[v] >= sum(row) / VOCABULARY:  # may be drawn
                estimates[m] += float(log_probs[m].exp() * (log_probs[m] - reference[m, v]))
    assert estimates == pytest.approx(expected, rel=1e-12)
    assert min(expected) > 0.1


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("logits_at_once", [22, 10**6])
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_are_the_numerical_ones(kind: str, logits_at_once: int) -> None:
    case = make_case(kind)

    def weighed(hidden: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        head = case.head._replace(weight=weight, bias=bias[0] if bias else None)
        found = statistics(case._replace(hidden=hidden, head=head), logits_at_once)
        return found.log_probs, found.kl

    leaves = [each for each in (case.hidden, case.head.weight, case.head.bias) if each is not None]
    assert torch.autograd.gradcheck(weighed, leaves)


def test_gradient_from_logits_is_that_of_a_softmax_over_the_kept_tokens() -> None:
    logits = 3 * torch.randn(2, 4, VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = torch.arange(8).view(2, 4)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(token_statistics(logits, ids, 0.7, above_the_mean).log_probs.sum(), logits)
    for i in range(2):
        for t in range(4):
            row, token = [value / 0.7 for value in logits[i, t].tolist()], int(ids[i, t])
            *_, kept = oracle(row, row, token)
            total = math.fsum(math.exp(row[v]) for v in kept)
            expected = [((v == token) - (v in kept) * math.exp(row[v]) / total) / 0.7 for v in range(VOCABULARY)]
            assert gradient[i, t].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("logits_at_once", [1, 22, 10**6])
@pytest.mark.parametrize("kind", HEADS)
def test_tokens_that_neither_model_counts(kind: str, logits_at_once: int) -> None:
    """Every third token is left out of both distributions, another third at each position."""

    def third(logits: Tensor, rows: slice) -> Tensor:
        positions = torch.arange(1000)[rows][: len(logits), None]
        return (torch.arange(VOCABULARY) + positions) % 3 != 0

    case = make_case(kind)
    stats = hidden_statistics(
        case.hidden,
        case.head,
        case.ids,
        0.7,
        reference=(case.other, case.other_head),
        sampling_mask=third,
        reference_mask=third,
        logits_at_once=logits_at_once,
    )
    rows, others = logit_rows(case.hidden, case.head, 0.7), logit_rows(case.other, case.other_head, 0.7)
    for m, token in enumerate(case.ids.tolist()):
        counted = [v for v in range(VOCABULARY) if (v + m) % 3 != 0 or v == token]
        total, total_other = (math.log(math.fsum(math.exp(row[v]) for v in counted)) for row in (rows[m], others[m]))
        log_probs = {v: rows[m][v] - total for v in counted}
        assert stats.log_probs[m].item() == pytest.approx(log_probs[token], rel=1e-12, abs=1e-14)
        kl = math.fsum(math.exp(log_probs[v]) * (log_probs[v] - others[m][v] + total_other) for v in counted)
        assert stats.kl[m].item() == pytest.approx(kl, rel=1e-10, abs=1e-14)
    for output in (stats.log_probs, stats.kl, stats.entropy):
        assert output.isfinite().all()
    gradients = torch.autograd.grad((stats.log_probs + 0.3 * stats.kl).sum(), [case.hidden, case.head.weight])
    assert all(gradient.isfinite().all() for gradient in gradients)
    finite = torch.autograd.gradcheck(
        lambda hidden: hidden_statistics(hidden, case.head, case.ids, 0.7, reference=(case.other, case.other_head),
                                         sampling_mask=third, reference_mask=third,
                                         logits_at_once=logits_at_once)[::2],
        case.hidden.detach().requires_grad_(),
    )  # fmt: skip
    assert finite


def test_a_single_kept_token_is_certain() -> None:
    case = make_case("everything")
    case = case._replace(ids=torch.tensor([max(range(VOCABULARY), key=row.__getitem__) for row in
                                           logit_rows(case.hidden, case.head, 1.0)]))  # fmt: skip
    found = hidden_statistics(
        case.hidden,
        case.head,
        case.ids,
        sampling_mask=lambda x, _: torch.zeros_like(x, dtype=torch.bool),
        logits_at_once=22,
    )
    assert found.log_probs.abs().max() == 0
    assert found.entropy.abs().max() == 0
    (gradient,) = torch.autograd.grad(found.log_probs.sum(), case.hidden)
    assert gradient.abs().max() == 0


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            self.size = max(self.size, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("kind", HEADS)
def test_no_tensor_is_larger_than_a_chunk_forward_or_backward(kind: str) -> None:
    case = make_case(kind, torch.float32, tokens=200)
    with Largest() as largest:
        found = statistics(case, logits_at_once=110)
        (found.log_probs.sum() + found.kl.sum()).backward()
    assert largest.size <= 200 * 5  # the hidden states and their gradient, not 200 * 11
