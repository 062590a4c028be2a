from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from oracles import enumeration, estimates
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from remax_lightning.functional import (
    OutputHead,
    TokenStatistics,
    hidden_statistics,
    reinforce_loss,
    remax_advantages,
    token_statistics,
)


def make(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(3, 5, 11, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, 11, (3, 5), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_statistics_are_those_of_the_oracle(temperature: float) -> None:
    logits, ids = make()
    log_probs, entropy, *_ = token_statistics(logits, ids, temperature)
    for i in range(3):
        for t in range(5):
            row = logits[i, t].tolist()
            expected = estimates.log_softmax(row, temperature)[ids[i, t]]
            assert log_probs[i, t].item() == pytest.approx(expected, rel=1e-12)
            assert entropy[i, t].item() == pytest.approx(estimates.entropy(row, temperature), rel=1e-12)


def test_tokens_that_cannot_come_have_no_entropy() -> None:
    logits = torch.full((1, 1, 4), float("-inf"))
    logits[..., :2] = 0.0
    log_probs, entropy, *_ = token_statistics(logits, torch.zeros(1, 1, dtype=torch.int32))
    assert entropy.item() == pytest.approx(math.log(2))
    assert log_probs.item() == pytest.approx(-math.log(2))


def test_entropy_is_detached_and_log_probs_have_the_numerical_gradient() -> None:
    logits, ids = make()
    logits.requires_grad_()
    log_probs, entropy, *_ = token_statistics(logits, ids)
    assert log_probs.requires_grad
    assert not entropy.requires_grad
    assert torch.autograd.gradcheck(lambda x: token_statistics(x, ids, 0.7).log_probs, logits)


def test_the_graph_holds_one_tensor_of_the_logits_size() -> None:
    logits, ids = make(torch.float32)
    logits.requires_grad_()
    kept: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == logits.numel():
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_statistics(logits, ids, 0.7)
    assert len(kept) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, ids = make(dtype)
    half, single = token_statistics(logits, ids), token_statistics(logits.float(), ids)
    assert half.log_probs.dtype == half.entropy.dtype == torch.float32
    assert torch.equal(half.log_probs, single.log_probs)
    assert torch.equal(half.entropy, single.entropy)


def test_wrong_arguments_are_refused() -> None:
    logits, ids = make()
    with pytest.raises(ValueError, match=r"logits must have shape \[S, R, V\] = \[any, any, any\], got \[5, 11\]"):
        token_statistics(logits[0], ids)
    with pytest.raises(ValueError, match=r"ids must have shape \[S, R\] = \[3, 5\], got \[3, 4\]"):
        token_statistics(logits, ids[:, :4])
    with pytest.raises(ValueError, match=r"temperature must be above 0, got 0"):
        token_statistics(logits, ids, 0.0)


# From hidden states


class Case(NamedTuple):
    hidden: Tensor
    head: OutputHead
    ids: Tensor
    other: Tensor
    other_head: OutputHead


HEADS = {
    "plain": (False, 1.0, None),
    "bias": (True, 1.0, None),
    "scaled": (False, 0.3, None),
    "capped": (False, 1.0, 2.0),
    "everything": (True, 1.7, 3.0),
}


def make_case(kind: str = "everything", dtype: torch.dtype = torch.float64, tokens: int = 7) -> Case:
    """Hidden states of policy and reference, of different sizes, over a vocabulary of eleven; weights are leaves."""
    generator = torch.Generator().manual_seed(3)
    with_bias, scale, cap = HEADS[kind]
    shapes = (tokens, 5), (11, 5), (11,), (tokens, 4), (11, 4)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    hidden, weight, bias = (tensor.requires_grad_() for tensor in tensors[:3])
    head = OutputHead(weight, bias if with_bias else None, scale, cap)
    ids = torch.randint(0, 11, (tokens,), generator=generator)
    return Case(hidden, head, ids, tensors[3], OutputHead(tensors[4], None, 0.8, None))


def plain_logits(hidden: Tensor, head: OutputHead) -> Tensor:
    """The `[M, V]` logits, made at once."""
    logits = head.scale * torch.nn.functional.linear(hidden, head.weight, head.bias)
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


def plain(case: Case, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and KL with every intermediate tensor kept by autograd."""
    own = (plain_logits(case.hidden, case.head) / temperature).log_softmax(-1)
    other = (plain_logits(case.other, case.other_head) / temperature).log_softmax(-1)
    return own.gather(-1, case.ids[:, None]).squeeze(-1), (own.exp() * (own - other)).sum(-1)


def ours(case: Case, temperature: float = 1.0, logits_at_once: int = 22) -> TokenStatistics:
    reference = case.other, case.other_head
    return hidden_statistics(
        case.hidden,
        case.head,
        case.ids,
        temperature,
        reference=reference,
        squared_norm=True,
        logits_at_once=logits_at_once,
    )


def leaves(case: Case) -> list[Tensor]:
    return [tensor for tensor in (case.hidden, case.head.weight, case.head.bias) if tensor is not None]


@pytest.mark.parametrize("logits_at_once", [1, 22, 33, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", HEADS)
def test_statistics_from_hidden_states_are_those_of_the_oracle(
    kind: str, temperature: float, logits_at_once: int
) -> None:
    case = make_case(kind)
    log_probs, entropy, kl, _ = ours(case, temperature, logits_at_once)
    alone = hidden_statistics(case.hidden, case.head, case.ids, temperature, logits_at_once=logits_at_once)
    assert torch.equal(alone.log_probs, log_probs)
    assert torch.equal(alone.entropy, entropy)
    assert alone.kl is None
    own_logits = plain_logits(case.hidden, case.head).tolist()
    other_logits = plain_logits(case.other, case.other_head).tolist()
    for m, (row, other_row) in enumerate(zip(own_logits, other_logits, strict=True)):
        own, other = estimates.log_softmax(row, temperature), estimates.log_softmax(other_row, temperature)
        divergence = math.fsum(math.exp(p) * (p - q) for p, q in zip(own, other, strict=True))
        assert log_probs[m].item() == pytest.approx(own[case.ids[m]], rel=1e-12)
        assert entropy[m].item() == pytest.approx(estimates.entropy(row, temperature), rel=1e-12)
        assert kl[m].item() == pytest.approx(divergence, rel=1e-11)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_from_hidden_states_are_the_numerical_ones(kind: str) -> None:
    case = make_case(kind)

    def weighed(hidden: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        head = case.head._replace(weight=weight, bias=bias[0] if bias else None)
        found = ours(case._replace(hidden=hidden, head=head), 0.7)
        return found.log_probs, found.kl

    assert torch.autograd.gradcheck(weighed, leaves(case))


def losses(log_probs: Tensor, kl: Tensor, weights: Tensor) -> dict[str, Tensor]:
    first, second = log_probs @ weights[0], kl @ weights[1]
    return {"log_probs": first, "kl": second, "both": first + second}


def in_float64(case: Case) -> Case:
    """The same numbers, of twice the precision."""

    def doubled(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

    own, other = (
        head._replace(weight=doubled(head.weight), bias=doubled(head.bias)) for head in (case.head, case.other_head)
    )
    return case._replace(hidden=doubled(case.hidden), head=own, other=doubled(case.other), other_head=other)


@pytest.mark.parametrize("part", ["log_probs", "kl", "both"])
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_in_float32_are_those_of_the_plain_computation(kind: str, part: str) -> None:
    """Of the plain one in float64: in float32 its own rounding comes near to the bound."""
    case = make_case(kind, torch.float32, tokens=50)
    exact = in_float64(case)
    weights = torch.randn(2, 50, generator=torch.Generator().manual_seed(4))
    actual = torch.autograd.grad(losses(*ours(case, 0.7)[::2], weights)[part], leaves(case))
    expected = torch.autograd.grad(losses(*plain(exact, 0.7), weights.double())[part], leaves(exact))
    for one, other in zip(actual, expected, strict=True):
        assert float(other.abs().max()) > 0.1
        assert float((one - other).abs().max()) < 1e-6 * max(1.0, float(other.abs().max()))


def test_entropy_is_detached_and_the_reference_has_no_gradient() -> None:
    case = make_case()
    case.other.requires_grad_()
    case.other_head.weight.requires_grad_()
    found = ours(case)
    assert not found.entropy.requires_grad
    (found.log_probs.sum() + found.kl.sum()).backward()
    assert case.other.grad is None
    assert case.other_head.weight.grad is None


def test_a_policy_that_is_its_reference_has_no_kl() -> None:
    case = make_case("capped", torch.float32)
    found = hidden_statistics(case.hidden, case.head, case.ids, reference=(case.hidden, case.head))
    assert found.kl.abs().max() == 0.0


class Watch(TorchDispatchMode):
    """Notes the size of every tensor that is made, and how many matrix products there are."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("kind", HEADS)
def test_no_tensor_is_larger_than_a_chunk_forward_or_backward(kind: str) -> None:
    case = make_case(kind, torch.float32, tokens=200)
    assert case.head.weight.numel() < 110  # ten tokens times eleven
    with Watch() as watch:
        found = ours(case, 0.7, logits_at_once=110)
        (found.log_probs.sum() + found.kl.sum()).backward()
    assert watch.largest <= 200 * 5  # the hidden states and their gradient, not 200 * 11


@pytest.mark.parametrize(("logits_at_once", "again"), [(10**6, 0), (22, 4)])  # at once: kept; else four chunks
@pytest.mark.parametrize(("frozen", "wanted"), [((), 2), (("weight",), 1), (("hidden",), 1)])
def test_products_of_the_backward_pass(frozen: tuple[str, ...], wanted: int, logits_at_once: int, again: int) -> None:
    case = make_case("plain", torch.float32)
    for name, tensor in (("weight", case.head.weight), ("hidden", case.hidden)):
        tensor.requires_grad_(name not in frozen)
    log_probs = hidden_statistics(case.hidden, case.head, case.ids, logits_at_once=logits_at_once).log_probs
    with Watch() as watch:
        log_probs.sum().backward()
    assert watch.products == again + wanted * max(1, again)
    assert (case.head.weight.grad is None) == ("weight" in frozen)
    assert (case.hidden.grad is None) == ("hidden" in frozen)


def test_a_bfloat16_head_multiplies_in_bfloat16_and_the_rest_is_float32() -> None:
    case = make_case("plain", torch.bfloat16, tokens=500)
    log_probs, entropy, kl, _ = ours(case)
    assert log_probs.dtype == entropy.dtype == kl.dtype == torch.float32
    logits = plain_logits(case.hidden, case.head).float()
    expected = token_statistics(logits[None], case.ids[None])
    torch.testing.assert_close(log_probs, expected.log_probs[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy, expected.entropy[0], atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(log_probs.sum(), case.head.weight)
    assert gradient.dtype == torch.bfloat16
    # The sum of 250 chunks is rounded once, not 250 times.
    (exact,) = torch.autograd.grad(expected.log_probs.sum(), logits)
    exact = exact.to(torch.bfloat16).double().T @ case.hidden.detach().double()
    assert float((gradient - exact).abs().max() / exact.abs().max()) < 0.006


def test_autocast_multiplies_in_its_dtype() -> None:
    case = make_case("plain", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = hidden_statistics(case.hidden, case.head, case.ids)
        logits = plain_logits(case.hidden, case.head)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(found.log_probs, token_statistics(logits[None], case.ids[None]).log_probs[0])
    found.log_probs.sum().backward()  # outside of autocast, as Lightning does it
    assert case.head.weight.grad.dtype == torch.float32
    expected = torch.autograd.grad(token_statistics(logits[None], case.ids[None]).log_probs.sum(), case.head.weight)[0]
    torch.testing.assert_close(case.head.weight.grad, expected, rtol=0.02, atol=0.02)


def test_tokens_that_cannot_come_are_left_out_from_hidden_states_too() -> None:
    bias = torch.full((4,), float("-inf"))
    bias[:2] = 0.0
    hidden, weight = torch.ones(1, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    reference = torch.ones(1, 2), OutputHead(torch.zeros(4, 2))
    found = hidden_statistics(hidden, OutputHead(weight, bias), torch.tensor([0]), reference=reference)
    assert found.entropy.item() == pytest.approx(math.log(2))
    assert found.kl.item() == pytest.approx(math.log(2))
    (found.kl + found.log_probs).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_no_tokens_have_no_statistics() -> None:
    case = make_case(tokens=0)
    found = ours(case)
    assert [len(values) for values in found] == [0, 0, 0, 0]
    found.log_probs.sum().backward()
    assert float(case.head.weight.grad.abs().max()) == 0.0


def test_wrong_arguments_of_hidden_statistics_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"hidden must have shape \[M, D\] = \[any, 5\], got \[7, 4\]"):
        hidden_statistics(case.other, case.head, case.ids)
    with pytest.raises(ValueError, match=r"ids must have shape \[M\] = \[7\], got \[6\]"):
        hidden_statistics(case.hidden, case.head, case.ids[:6])
    with pytest.raises(ValueError, match=r"temperature must be above 0, got 0"):
        ours(case, 0.0)
    with pytest.raises(ValueError, match=r"logits_at_once must be above 0, got 0"):
        ours(case, logits_at_once=0)
    smaller = case.other_head._replace(weight=case.other_head.weight[:9])
    with pytest.raises(
        ValueError, match=r"the reference's weight must have shape \[V, D'\] = \[11, any\], got \[9, 4\]"
    ):
        ours(case._replace(other_head=smaller))
    with pytest.raises(ValueError, match=r"the reference's hidden must have shape \[M, D'\] = \[7, 4\], got \[6, 4\]"):
        ours(case._replace(other=case.other[:6]))


# What the KL over the vocabulary does as a reward and as a loss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("credit", "loss_coef", "beta"), [
    ("to_go", 0.3, 0.3),  # later tokens through the reward, the token's own through the loss: the exact gradient
    ("one_step", 0.0, 0.0),  # independent of the sampled token: no gradient at all in expectation
])  # fmt: skip
def test_expected_gradient_with_the_kl_over_the_vocabulary(
    credit: Any, loss_coef: float, beta: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    responses, prefixes = enumeration.responses(), enumeration.prefixes()
    size = len(prefixes), enumeration.VOCABULARY
    table, other = torch.randn(2, *size, generator=generator, dtype=torch.float64)
    reward = torch.randn(len(responses), generator=generator, dtype=torch.float64)
    table.requires_grad_()
    mask = torch.tensor([[t < len(response) for t in range(enumeration.MAX_LENGTH)] for response in responses])
    rows = torch.tensor([prefixes.index(response[:t]) for response in responses for t in range(len(response))])
    states = torch.nn.functional.one_hot(rows, len(prefixes)).double()
    ids = torch.tensor([token for response in responses for token in response])
    found = hidden_statistics(states, OutputHead(table.T), ids, reference=(states, OutputHead(other.T)))
    log_probs, kl = (torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, x) for x in found[::2])
    advantages = remax_advantages(reward, mask, baseline="none", kl=kl.detach(), kl_coef=0.3, kl_credit=credit)
    probability = log_probs.detach().sum(1, keepdim=True).exp()
    loss = reinforce_loss(log_probs, advantages * probability, mask, 1.0) + loss_coef * (probability * kl).sum()
    (actual,) = torch.autograd.grad(-loss, table)
    rewards = dict(zip(responses, reward.tolist(), strict=True))
    exact, elsewhere = (enumeration.exact_gradient(table.detach(), rewards, other, x) for x in (beta, 0.3 - beta))
    assert float((exact - elsewhere).abs().max()) > 1e-2
    torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("logits_at_once", [7, 2**24])
def test_squared_norms_are_those_of_the_gradient_at_the_logits(logits_at_once: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    ids = torch.randint(11, (9,), generator=generator)
    logits = (hidden @ weight.T).requires_grad_()
    chosen = logits.log_softmax(-1).gather(1, ids[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, logits)
    expected = gradient.square().sum(1)
    chunked = partial(hidden_statistics, hidden, OutputHead(weight), ids, logits_at_once=logits_at_once)
    whole = partial(token_statistics, logits.detach()[None], ids[None])
    torch.testing.assert_close(chunked(squared_norm=True).squared_norm, expected)
    torch.testing.assert_close(whole(squared_norm=True).squared_norm[0], expected)
    assert chunked().squared_norm is None
    assert whole().squared_norm is None, "it reads all probabilities once more"


@pytest.mark.parametrize("logits_at_once", [22, 10**6])
def test_log_probs_and_gradients_are_the_same_without_entropies(logits_at_once: int) -> None:
    found = []
    for entropy in (True, False):
        case = make_case()
        statistics = hidden_statistics(
            case.hidden,
            case.head,
            case.ids,
            reference=(case.other, case.other_head),
            entropy=entropy,
            logits_at_once=logits_at_once,
        )
        assert (statistics.entropy is None) != entropy
        assert statistics.kl is not None
        total = statistics.log_probs.sum() + statistics.kl.sum()
        found.append([statistics.log_probs, statistics.kl, *torch.autograd.grad(total, leaves(case))])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    logits = plain_logits(case.hidden, case.head)[None]
    assert token_statistics(logits, case.ids[None], entropy=False).entropy is None
