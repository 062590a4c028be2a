"""`response_statistics` against one response at a time, without padding, in double precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from helpers.six_responses import FAMILIES, FORMS, PROMPTS, RESPONSES, batch, model_of, one_by_one, rollout_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from remax_lightning.errors import UserError
from remax_lightning.models import log_probs as statistics_module
from remax_lightning.models.forward import HeadSearch, find_head
from remax_lightning.models.log_probs import policy_statistics, response_statistics, with_reference
from remax_lightning.rollout import SamplingConfig

PLAIN, TEMPERED = SamplingConfig(), SamplingConfig(temperature=0.6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_single_unpadded_rows(family: str, temperature: float) -> None:
    model = tiny_model(family)
    found = response_statistics(model, *batch(), temperature)
    sampling = SamplingConfig(temperature=temperature)
    norms = policy_statistics(model, rollout_of(), sampling, packed=False, squared_norm=True).squared_norm
    columns = (found.log_probs, found.entropy, norms)
    for values, expected in zip(columns, one_by_one(model, temperature), strict=True):
        assert values.shape == (6, 5)
        for row, wanted in zip(values.tolist(), expected, strict=True):
            assert row[: len(wanted)] == pytest.approx(wanted, abs=2e-5)
            assert row[len(wanted) :] == [0.0] * (5 - len(wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    plain = response_statistics(model, *batch())
    padded = response_statistics(model, *batch(extra_left=7, extra_right=4, pad=2))  # 2 is the end of sequence
    for before, after in zip(plain[:2], padded[:2], strict=True):
        assert after.shape == (6, 9)
        torch.testing.assert_close(after, F.pad(before, (0, 4)), atol=1e-6, rtol=0)


def test_logits_are_made_at_response_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    response_statistics(model, *batch())  # a model's first pass runs a few tokens before
    positions: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: positions.append(output.shape[1]))
    response_statistics(model, *batch(extra_left=20, extra_right=20))
    assert positions == [6]  # the longest response has five tokens; one more predicts the first


def test_gradient_comes_from_the_log_probs_of_counted_tokens_only() -> None:
    model = tiny_model("gpt2")
    prompt, responses = batch()
    statistics = response_statistics(model, prompt, responses)
    assert not statistics.entropy.requires_grad
    outside = ~responses.response_mask
    gradient = torch.autograd.grad(statistics.log_probs[outside].sum(), model.lm_head.weight, allow_unused=True)[0]
    assert gradient is None or float(gradient.abs().max()) == 0


# With and without the model making its logits itself


@pytest.fixture
def without_heads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and models make their logits themselves."""
    return lambda: monkeypatch.setattr(statistics_module, "find_head", lambda model: HeadSearch(None, "test"))


def test_the_reference_computes_no_entropies(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    computed = statistics_module.hidden_statistics

    def recorded(*args: Any, **options: Any) -> Any:
        asked.append(options["entropy"])
        return computed(*args, **options)

    monkeypatch.setattr(statistics_module, "hidden_statistics", recorded)
    with torch.no_grad():
        with_reference(rollout_of(), tiny_model("llama"), PLAIN)
    policy_statistics(tiny_model("llama"), rollout_of(), PLAIN)
    assert asked == [False, True]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", FORMS)
def test_hidden_states_give_what_logits_give(family: str, temperature: float, without_heads: Any) -> None:
    model = model_of(family)
    assert find_head(model).head is not None
    weights = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))

    def found() -> tuple[Any, list[Tensor]]:
        sampling = SamplingConfig(temperature=temperature)
        statistics = policy_statistics(model, rollout_of(), sampling, packed=False, squared_norm=True)
        return statistics, torch.autograd.grad((weights * statistics.log_probs).sum(), list(model.parameters()))

    statistics, gradients = found()
    without_heads()
    expected, expected_gradients = found()
    for name in ("log_probs", "entropy", "squared_norm"):
        torch.testing.assert_close(getattr(statistics, name), getattr(expected, name), atol=1e-5, rtol=0)
    assert expected.log_probs.std() > 0.3
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients)
    assert max(map(distance, gradients, expected_gradients)) < 1e-5 * largest


def distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_without_a_head_either(family: str, without_heads: Any) -> None:
    without_heads()
    test_padding_changes_nothing(family)


class Largest(TorchDispatchMode):
    """Notes the largest tensor whose last dimension is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            # The transposed weight has the vocabulary last, too.
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (500,) and tensor.shape != (32, 500):
                self.tokens = max(self.tokens, tensor.numel() // 500)
        return result


def test_logits_are_made_of_a_few_counted_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch, without_heads: Any) -> None:
    model = tiny_model("llama", vocab_size=500)
    response_statistics(model, *batch())  # a model's first pass runs a few tokens before
    chunked = statistics_module.hidden_statistics
    monkeypatch.setattr(
        statistics_module,
        "hidden_statistics",
        lambda *inputs, **options: chunked(*inputs, **options, logits_at_once=4 * 500),
    )
    with Largest() as largest:
        response_statistics(model, *batch()).log_probs.sum().backward()
    assert largest.tokens == 4
    without_heads()
    with Largest() as largest:
        response_statistics(model, *batch()).log_probs.sum().backward()
    assert largest.tokens >= 6 * 5


# The KL over the vocabulary


def kl_one_by_one(policy: Any, reference: Any, temperature: float) -> list[list[float]]:
    """KL(policy || reference) over the vocabulary, one unpadded response after the other, in double precision."""
    doubles = [copy.deepcopy(model).double() for model in (policy, reference)]
    found = []
    for i, response in enumerate(RESPONSES):
        prompt = PROMPTS[i // 2]
        with torch.no_grad():
            own, other = (
                model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature for model in doubles
            )
        rows = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        found.append(
            [
                float(
                    torch.distributions.kl_divergence(
                        *(torch.distributions.Categorical(logits=x[t]) for x in (own, other))
                    )
                )
                for t in rows
            ]
        )
    return found


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("padding", [{}, {"extra_left": 3, "extra_right": 2}])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("family", "other"), [("llama", "llama"), ("gpt2", "opt"), ("gemma2", "cohere")])
def test_kl_over_the_vocabulary(family: str, other: str, splits: int, padding: dict[str, int]) -> None:
    policy, reference = model_of(family), model_of(other, seed=1)
    with torch.no_grad():
        rollout = with_reference(rollout_of(splits, **padding), reference, TEMPERED, keep_hidden=True)
    width = rollout.sampled.response_mask.shape[1]
    assert rollout.reference_hidden.shape == (6, width, 32)
    assert rollout.reference_hidden[~rollout.sampled.response_mask].abs().max() == 0
    found = policy_statistics(policy, rollout, TEMPERED, reference, batch_size=6 // splits)
    assert found.kl.requires_grad
    for row, wanted in zip(found.kl.tolist(), kl_one_by_one(policy, reference, 0.6), strict=True):
        assert row[: len(wanted)] == pytest.approx(wanted, abs=2e-5, rel=1e-5)
        assert row[len(wanted) :] == [0.0] * (width - len(wanted))
        assert max(wanted) > 0.05
    plain = response_statistics(policy, rollout.prompt, rollout.sampled, 0.6)
    torch.testing.assert_close(found.log_probs, plain.log_probs, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.entropy, plain.entropy, atol=1e-6, rtol=0)


def test_the_reference_keeps_nothing_unless_asked_and_changes_no_log_probs() -> None:
    reference = tiny_model("llama")
    with torch.no_grad():
        rollout = with_reference(rollout_of(3), reference, PLAIN)
        whole = with_reference(rollout_of(), reference, PLAIN, keep_hidden=True)
    assert rollout.reference_hidden is None
    assert policy_statistics(reference, rollout, PLAIN, reference).kl is None
    torch.testing.assert_close(rollout.reference_log_probs, whole.reference_log_probs, atol=1e-6, rtol=0)
    assert policy_statistics(reference, whole, PLAIN, reference).kl.abs().max() == 0


def test_a_model_whose_head_cannot_be_read_has_no_kl_over_the_vocabulary() -> None:
    policy, reference = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        rollout = with_reference(rollout_of(), reference, PLAIN, keep_hidden=True)
    policy.lm_head.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(UserError, match=r"model\.kl\.estimator .* the output head of model\.policy"):
        policy_statistics(policy, rollout, PLAIN, reference)
    with pytest.raises(UserError, match=r"model\.kl\.estimator .* the output head of model\.reference"):
        with_reference(rollout, policy, PLAIN, keep_hidden=True)
