"""What is measured on the responses of a run without training: squared norms of their gradients, rewards, seconds.

The norm over all weights is what the variance of the gradient is made of, and takes a backward pass for each response.
Those at the logits and of the output head are cheap, and stand in for it during training; `agreement` says how well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remax_lightning.baselines import Baseline, BaselineInputs, OptimalPerToken, checked_values
from remax_lightning.functional import hidden_statistics
from remax_lightning.models.forward import find_head, hidden_states
from remax_lightning.modules import ReMaxModule
from remax_lightning.tools.doctor.context import DoctorContext, select_rows
from remax_lightning.training.worker import GeneratedResponses
from remax_lightning.types import PromptBatch, Rollout

NUM_RESAMPLES = 1000


class SquaredNorms(NamedTuple):
    """Of the gradient of `log π(y)` of each response, or of its tokens with weights of their own, `[S]` each.

    Args:
        weights: over all weights that are trained.
        logits: `Σ_t |onehot(y_t) - π_t|²`, at the logits: what the monitor of a run takes.
        head: of the output head alone, `|Σ_t (onehot(y_t) - π_t) h_tᵀ|²`; None where it cannot be read.
        head_tokens: of it, token by token, `Σ_t |onehot(y_t) - π_t|² |h_t|²`.
    """

    weights: Tensor
    logits: Tensor
    head: Tensor | None = None
    head_tokens: Tensor | None = None


class Sample(NamedTuple):
    """What was measured on the responses to `B` prompts, `n` samples each.

    Args:
        reward: `[S]` rewards.
        greedy_reward: `[B]` rewards of the greedy responses.
        lengths: `[S]` tokens.
        norms: squared norms of `∇ log π(y)`.
        num_samples: `n`.
        optimal: squared norms of `Σ_t (r - b_t) ∇ log π(y_t)`, with the values of `optimal_per_token`; None where they
            were not measured.
    """

    reward: Tensor
    greedy_reward: Tensor
    lengths: Tensor
    norms: SquaredNorms
    num_samples: int
    optimal: SquaredNorms | None = None


class Seconds(NamedTuple):
    """Seconds per trained response.

    Args:
        rollout: decoding and scoring without greedy responses.
        greedy: what greedy responses add to that.
        training: the pass with gradients.
        reading: the pass without gradients for a baseline that reads them.
    """

    rollout: float
    greedy: float
    training: float
    reading: float = 0.0

    def of(self, baseline: Baseline) -> float:
        """Return the seconds of a trained response with a baseline."""
        reading = self.reading if baseline.reads_gradients else 0.0
        return self.rollout + baseline.greedy_share * self.greedy + reading + self.training


# ---- Norms ----


def squared_norms(module: ReMaxModule, rollout: Rollout) -> tuple[SquaredNorms, SquaredNorms]:
    """Return the norms of the responses of a rollout, and those with `optimal_per_token`; two backward passes for each.

    A response has one gradient under any baseline, also under one with a value for each token: its tokens' gradients,
    each times its own advantage, add up before the norm is taken.
    """
    ones = torch.ones_like(rollout.sampled.response_mask, dtype=torch.float32)
    weights, tokens = _norms_of_responses(module, rollout, ones)
    inputs = BaselineInputs(
        reward=rollout.reward.double().cpu(),
        num_samples=rollout.num_samples,
        greedy_reward=None,
        lengths=rollout.sampled.response_mask.sum(1).double().cpu(),
        prompts=None,
        squared_norms=tokens.double().cpu(),
    )
    advantages = inputs.reward[:, None] - checked_values(OptimalPerToken(), inputs)  # [S, R]
    optimal, _ = _norms_of_responses(module, rollout, advantages.to(tokens))
    optimal_logits = (advantages.square() * cast(Tensor, inputs.squared_norms)).sum(1)
    free(module)
    heads: tuple[Tensor | None, ...] = (None, None)
    if find_head(module.policy).head is not None:
        pairs = [_head_norms(module, rollout, row) for row in range(len(rollout.reward))]
        heads = tuple(torch.stack(column).double() for column in zip(*pairs, strict=True))
    return SquaredNorms(weights, tokens.double().sum(1), *heads), SquaredNorms(optimal, optimal_logits)


def _norms_of_responses(module: ReMaxModule, rollout: Rollout, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return `[S]` squared norms over all weights, `factors` `[S, R]` on the tokens, and `[S, R]` at the logits."""
    weights, tokens = [], []
    num_prompts, n = len(rollout.prompt.prompts), rollout.num_samples
    for index in range(num_prompts):
        part = rollout.micro_batch(index, num_prompts)  # a prompt with its n samples
        for sample in range(n):
            active = torch.arange(n, device=module.device) == sample  # [n]
            tokens.append(differentiate(module, part, active, factors[index * n : (index + 1) * n])[sample])
            gradients = (weight.grad for weight in module.policy.parameters() if weight.grad is not None)
            norm: Any = sum(gradient.double().square().sum() for gradient in gradients)
            weights.append(torch.as_tensor(norm))
    return torch.stack(weights).double(), torch.stack(tokens)


def differentiate(
    module: ReMaxModule, rollout: Rollout, active: Tensor | None = None, factors: Tensor | None = None
) -> Tensor:
    """Leave the gradient of the sum of `log π(y_t)` over the active responses in the weights.

    Args:
        module: its policy is differentiated.
        rollout: `S` responses.
        active: `[S]` which of them; None for all.
        factors: `[S, R]` on the log-probs of the tokens; None for ones.

    Returns:
        `[S, R]` squared norms at the logits, without the factors; 0 of the others.
    """
    free(module)
    with torch.enable_grad():
        stats = module.token_statistics(rollout, active, norm=True)  # [S, R]
        mask = module.objective.loss_mask(rollout)  # without those of `advantage.overlong: mask`
        mask = mask if active is None else mask & active[:, None]
        terms = stats.log_probs if factors is None else stats.log_probs * factors
        terms.masked_fill(~mask, 0.0).sum().backward()
    return cast(Tensor, stats.squared_norm).masked_fill(~mask, 0.0)


def free(module: ReMaxModule) -> None:
    """Free the gradients of the weights."""
    for parameter in module.policy.parameters():
        parameter.grad = None


def _head_norms(module: ReMaxModule, rollout: Rollout, row: int) -> tuple[Tensor, Tensor]:
    """Return the squared norm of the gradient of the head, of a weight shared with nothing, and token by token."""
    prompt, sampled = rollout.prompt, rollout.sampled
    if not module.objective.loss_mask(rollout)[row].any():
        nothing = torch.zeros((), device=module.device)
        return nothing, nothing
    prompt_ids = prompt.prompt_ids[row // rollout.num_samples]
    prompt_ids = prompt_ids[prompt.prompt_mask[row // rollout.num_samples]]
    response = sampled.response_ids[row][sampled.response_mask[row]]  # [T]
    ids = torch.cat([prompt_ids, response])[None]
    with torch.no_grad():
        states = hidden_states(module.policy, ids, torch.ones_like(ids, dtype=torch.bool))[0]
    head = find_head(module.policy).head
    if head is None:
        raise ValueError("module must have a policy whose output head can be read")
    scaled = module.sampling.temperature if module.sampling.scale_log_probs else 1.0
    with torch.enable_grad():
        weight = head.weight.detach().requires_grad_()
        states, head = states[len(prompt_ids) - 1 : -1], head._replace(weight=weight)
        stats = hidden_statistics(states, head, response, scaled, entropy=False, squared_norm=True)
        (gradient,) = torch.autograd.grad(stats.log_probs.sum(), weight)
    tokens = cast(Tensor, stats.squared_norm).double() * states.double().square().sum(1)  # [T]
    return gradient.double().square().sum(), tokens.sum()


class Agreement(NamedTuple):
    """How a cheap norm agrees with the true one.

    Args:
        rank_correlation: Spearman's, with a 95 % interval (bootstrap over prompts).
        slope: of the logarithm of the true norm on that of the cheap one; 1 where they are proportional.
    """

    rank_correlation: tuple[float, float, float]
    slope: float


def agreement(true: Tensor, cheap: Tensor, num_samples: int) -> Agreement:
    """Compare two norms of the same responses.

    Args:
        true: `[S]` over all weights.
        cheap: `[S]`.
        num_samples: responses per prompt, which are drawn together.
    """
    pairs = torch.stack([true, cheap], 1).double().cpu().numpy()  # [S, 2]
    # A norm of 0 is one that rounding has taken; of a prompt it may be one sample's alone.
    counts = (pairs > 0).all(1) if (pairs > 0).all(1).sum() > 2 else np.ones(len(pairs), dtype=bool)  # [S]
    value = _spearman(pairs[counts])
    generator = np.random.default_rng(0)
    groups, counts_of = pairs.reshape(-1, num_samples, 2), counts.reshape(-1, num_samples)  # [B, n, 2], [B, n]
    draws = generator.integers(0, len(groups), (NUM_RESAMPLES, len(groups)))
    drawn = np.array([_spearman(groups[draw][counts_of[draw]]) for draw in draws])
    # Where all are alike, they have no ranks.
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, (0.025, 0.975)).tolist() if len(known) and value == value else (value, value)
    pairs = pairs[counts]
    logs = np.log(np.maximum(pairs, np.finfo(np.float64).tiny))
    centered = logs - logs.mean(0)
    spread = max(float((centered[:, 1] ** 2).sum()), float(np.finfo(np.float64).tiny))
    slope = float((centered[:, 0] * centered[:, 1]).sum()) / spread
    return Agreement((value, low, high), slope)


def _spearman(pairs: NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation of two columns, ties at the mean of their ranks."""
    if len(pairs) == 0:
        return float("nan")
    ranks = np.empty_like(pairs)
    for column in (0, 1):
        _, inverse, counts = np.unique(pairs[:, column], return_inverse=True, return_counts=True)
        ranks[:, column] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    centered = ranks - ranks.mean(0)
    spread = np.sqrt((centered**2).sum(0)).prod()
    return float(centered.prod(1).sum() / spread) if spread > 0 else float("nan")


# ---- Measuring ----


def measure(context: DoctorContext, num_samples: int, report: Callable[[str], None]) -> tuple[Sample, Seconds]:
    """Generate, score and differentiate responses to the prompts of a run; nothing is trained.

    Args:
        context: with models, data and reward loaded.
        num_samples: sampled responses per prompt.
        report: is told what is being done.
    """
    module = cast(ReMaxModule, context.module)
    run_samples = module.sampling.num_samples
    size = max(1, min(cast(Any, context.data).batch_size, len(context.prompt.prompts)))
    parts: list[list[Tensor]] = []
    norms: list[tuple[SquaredNorms, SquaredNorms]] = []
    times = {"greedy": 0.0, "plain": 0.0, "reading": 0.0, "training": 0.0}
    total = len(context.prompt.prompts)
    # The first calls allocate and choose kernels; they would count as the price of greedy responses.
    first = select_rows(context.prompt, range(min(size, 2)))
    differentiate(module, _roll_out(module, first, num_samples, True, 0))
    _roll_out(module, first, run_samples, False, 0)
    # Batches of about the same size: a baseline that reads gradients compares the responses of one of them.
    for places in torch.arange(total).tensor_split(-(-total // size)):
        start = int(places[0])
        prompt = select_rows(context.prompt, range(start, start + len(places)))
        report(f"prompts {start + 1} to {start + len(places)} of {total}")
        # ---- The same prompts with and without greedy responses, in turn ----
        # Timed with the samples of the run: of one greedy response for two samples each would pay half.
        rollout = _roll_out(module, prompt, num_samples, True, start)
        times["greedy"] += _timed(module, partial(_roll_out, module, prompt, run_samples, True, start))[1]
        times["plain"] += _timed(module, partial(_roll_out, module, prompt, run_samples, False, start))[1]
        # ---- Passes over them without and with gradients, and one of each response alone for its norms ----
        times["reading"] += _timed(module, partial(_read_gradients, module, rollout))[1]
        times["training"] += _timed(module, partial(differentiate, module, rollout))[1]
        norms.append(squared_norms(module, rollout))
        values = (rollout.reward, cast(Tensor, rollout.baseline_reward), rollout.sampled.response_mask.sum(1))
        parts.append([value.double().cpu() for value in values])
    reward, greedy_reward, lengths = (torch.cat(values) for values in zip(*parts, strict=True))
    joined = Sample(
        reward,
        greedy_reward,
        lengths,
        norms=_joined([pair[0] for pair in norms]),
        num_samples=num_samples,
        optimal=_joined([pair[1] for pair in norms]),
    )
    trained = len(joined.greedy_reward) * run_samples
    added = max(times["greedy"] - times["plain"], 0.0)
    # Several updates on a rollout make the pass without gradients anyway.
    reading = 0.0 if module.objective.loss_config.kind == "clipped" else times["reading"]
    per_response = (value / len(joined.reward) for value in (times["training"], reading))
    return joined, Seconds(times["plain"] / trained, added / trained, *per_response)


def _joined(parts: list[SquaredNorms]) -> SquaredNorms:
    """Return the norms of all batches, on the CPU."""
    columns = zip(*parts, strict=True)
    weights, logits, *heads = (
        None if None in values else torch.cat([cast(Tensor, value).cpu() for value in values]) for values in columns
    )
    return SquaredNorms(cast(Tensor, weights), cast(Tensor, logits), *heads)


@torch.no_grad()
def _read_gradients(module: ReMaxModule, rollout: Rollout) -> None:
    """Do what a step does for a baseline that reads gradients."""
    module.token_statistics(rollout, None, [torch.arange(len(rollout.reward), device=module.device)], norm=True)


def _roll_out(module: ReMaxModule, prompt: PromptBatch, num_samples: int, greedy: bool, seed: int) -> Rollout:
    generator = torch.Generator(module.device).manual_seed(seed)
    responses: GeneratedResponses = module.worker.generate_responses(
        module.policy, prompt, generator, greedy=greedy, num_samples=num_samples
    )
    return module.worker.score_responses(prompt, responses)


def _timed(module: ReMaxModule, run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return result, time.perf_counter() - start
