"""The baselines: without a memory, and with one of each prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, cast

import torch
from torch import Tensor

from remax_lightning.baselines.base import Baseline, BaselineInputs
from remax_lightning.errors import UserError, above, at_least, check_ranges
from remax_lightning.functional import (
    baseline_values,
    batch_mean,
    calibrated_greedy,
    greedy_and_samples,
    optimal_per_token,
    shrinkage,
)

_KEY = "model.advantage.baseline"

# ---- Without memory ----


class Greedy(Baseline):
    """The reward of the greedy response to the same prompt (ReMax, arXiv 2310.10505)."""

    greedy = "always"

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` values: b = r(x, y*), for all samples of a prompt."""
        return inputs.greedy.repeat_interleave(inputs.num_samples)


class NoBaseline(Baseline):
    """Zero: plain REINFORCE."""

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` zeros."""
        return torch.zeros_like(inputs.reward)


class LeaveOneOut(Baseline):
    """The mean reward of the prompt's other samples (RLOO, arXiv 2402.14740)."""

    min_samples = 2

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` values: b_ij = (Σ_k r_ik - r_ij) / (n - 1)."""
        return baseline_values(inputs.reward, inputs.num_samples, "leave_one_out")


class GroupMean(Baseline):
    """The mean reward of all of the prompt's samples, its own included (GRPO); scales the gradient by `(n - 1) / n`."""

    min_samples = 2
    is_unbiased = False

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` values: b_i = Σ_k r_ik / n."""
        return baseline_values(inputs.reward, inputs.num_samples, "group_mean")


class BatchMean(Baseline):
    """The mean reward of all other responses of the batch: one number less than a greedy response costs nothing."""

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` values: b_i = (Σ_k r_k - r_i) / (S - 1)."""
        return batch_mean(inputs.reward)


class OptimalConstant(Baseline):
    """The mean of all other responses, weighted by length, as the constant of least variance is by squared gradients.

    The squared norm of a response's gradient grows about with its length (OPO, arXiv 2505.23585).
    """

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` values: b_i = Σ_{k≠i} l_k r_k / Σ_{k≠i} l_k."""
        return batch_mean(inputs.reward, inputs.lengths)


class OptimalPerToken(Baseline):
    """For each token the mean of all other responses, weighted by their squared gradients up to that token.

    The optimal token baseline (arXiv 2602.07078) over the batch. The gradients, at the logits, take a pass before
    training; several updates on a rollout (`model.loss.kind: clipped`) make that pass anyway.
    """

    reads_gradients = True

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S, R]` values: b_it = Σ_{k≠i} W_kt r_k / Σ_{k≠i} W_kt."""
        return optimal_per_token(inputs.reward, cast(Tensor, inputs.squared_norms))


class GreedyAndSamples(Greedy):
    """The mean of the greedy response's reward and those of the prompt's other samples."""

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` values: b_ij = (g_i + Σ_{k≠j} r_ik) / n."""
        return greedy_and_samples(inputs.reward, inputs.num_samples, inputs.greedy)


class Shrinkage(Baseline):
    """The mean of the prompt's other samples, shrunk to the mean of the other prompts (arXiv 2511.03710)."""

    min_samples = 2

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` values."""
        return shrinkage(inputs.reward, inputs.num_samples)


class CalibratedGreedy(Greedy):
    """What the greedy response's reward lets expect, by a line through the greedy rewards of the other prompts.

    Where greedy and sampled rewards have little to do with each other, the reward of the greedy response alone adds
    variance; the slope of the line weighs it by what it says.

    Args:
        ridge: prompts without any relation that are added to the fit; 1 keeps a handful of prompts from deciding.

    Raises:
        UserError: if `ridge` is negative.
    """

    def __init__(self, ridge: Annotated[float, at_least(0)] = 1.0) -> None:
        check_ranges(CalibratedGreedy.__init__, locals(), _KEY)
        self.ridge = ridge

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` values: b_i = m + a · (g_i - g)."""
        return calibrated_greedy(inputs.reward, inputs.num_samples, inputs.greedy, self.ridge)


# ---- With a memory of each prompt ----


class PromptMemory:
    """A number, and a weight, for each prompt of a data set that was seen."""

    def __init__(self) -> None:
        self.values: dict[int, tuple[float, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as tensors."""
        numbers = torch.tensor(list(self.values.values()), dtype=torch.float64).view(-1, 2)
        return {"prompts": torch.tensor(list(self.values), dtype=torch.long), "values": numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the memory."""
        pairs = zip(state["prompts"].tolist(), state["values"].tolist(), strict=True)
        self.values = {int(prompt): (float(value), float(weight)) for prompt, (value, weight) in pairs}


class Tracker(Baseline):
    """A running value of each prompt across epochs, started from the reward of its greedy response (SPO, 2509.13232).

    Greedy responses are generated in rollouts with a prompt that was not seen before: in the first epoch, and where
    later ones have a prompt that did not fill a batch in it.

    Args:
        decay: how much of a prompt's earlier samples still counts at its next visit. 0.9 remembers about ten visits:
            the policy changes, and old rewards with it.
        greedy_weight: samples that the greedy response counts as.

    Raises:
        UserError: if an argument is out of its range.
    """

    greedy = "sometimes"
    remembers_prompts = True

    def __init__(
        self, decay: Annotated[float, at_least(0, at_most=1)] = 0.9, greedy_weight: Annotated[float, above(0)] = 1.0
    ) -> None:
        check_ranges(Tracker.__init__, locals(), _KEY)
        self.decay, self.greedy_weight = decay, greedy_weight
        self._memory = PromptMemory()

    def needs_greedy(self, prompts: Sequence[int] | None) -> bool:
        """Whether one of the prompts was not seen before."""
        return not prompts or any(prompt not in self._memory.values for prompt in prompts)

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` values: of earlier visits, and of the greedy response at the first."""
        known, greedy = self._memory.values, _greedy_rewards(inputs)
        per_prompt = [
            known[prompt][0] if prompt in known else greedy[row]
            for row, prompt in enumerate(_places(inputs, type(self)))
        ]
        return torch.tensor(per_prompt, dtype=torch.float64).repeat_interleave(inputs.num_samples)

    def observe(self, inputs: BaselineInputs) -> None:
        """Move the value of each prompt towards the mean of its samples."""
        means = inputs.reward.view(-1, inputs.num_samples).mean(1).tolist()  # [B]
        known, greedy = self._memory.values, _greedy_rewards(inputs)
        for row, prompt in enumerate(_places(inputs, type(self))):
            value, weight = known[prompt] if prompt in known else (greedy[row], self.greedy_weight)
            weight = self.decay * weight + inputs.num_samples
            known[prompt] = value + (means[row] - value) * inputs.num_samples / weight, weight

    def state_dict(self) -> dict[str, Any]:
        """Return the values of all prompts."""
        return self._memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values of all prompts."""
        self._memory.load_state_dict(state)


class CachedGreedy(Baseline):
    """The reward of the prompt's greedy response at an earlier visit, renewed now and then (PVPO, 2508.21104).

    The greedy response of an older policy is a baseline as well: it does not depend on the sampled one. Rollouts
    between two renewals need no greedy responses.

    Args:
        renew_every: visits of a prompt per greedy response. 4 saves three quarters of the greedy decoding.

    Raises:
        UserError: if `renew_every` is below 1.
    """

    greedy = "sometimes"
    remembers_prompts = True

    def __init__(self, renew_every: Annotated[int, at_least(1, note="visits")] = 4) -> None:
        check_ranges(CachedGreedy.__init__, locals(), _KEY)
        self.renew_every = renew_every
        self._memory = PromptMemory()  # reward, and visits since it was renewed

    @property
    def greedy_share(self) -> float:
        """Share of the rollouts that need greedy responses, once every prompt was seen."""
        return 1 / self.renew_every

    def needs_greedy(self, prompts: Sequence[int] | None) -> bool:
        """Whether the reward of one of the prompts is missing, or those of half of them are due.

        Not of one: an epoch leaves out the prompts that fill no batch, so that visits differ, and soon one is due in
        nearly every rollout. An older reward is a baseline as well.
        """
        known = self._memory.values
        if not prompts or any(prompt not in known for prompt in prompts):
            return True
        return 2 * sum(known[prompt][1] >= self.renew_every for prompt in prompts) >= len(prompts)

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` values: of this rollout's greedy responses where it has them."""
        if inputs.greedy_reward is not None:
            return inputs.greedy_reward.repeat_interleave(inputs.num_samples)
        per_prompt = [self._memory.values[prompt][0] for prompt in _places(inputs, type(self))]
        return torch.tensor(per_prompt, dtype=torch.float64).repeat_interleave(inputs.num_samples)

    def observe(self, inputs: BaselineInputs) -> None:
        """Keep new greedy rewards, and count the visits of the others."""
        known, greedy = self._memory.values, _greedy_rewards(inputs)
        for row, prompt in enumerate(_places(inputs, type(self))):
            if inputs.greedy_reward is not None:
                known[prompt] = greedy[row], 1.0
            else:
                value, visits = known[prompt]
                known[prompt] = value, visits + 1

    def state_dict(self) -> dict[str, Any]:
        """Return the rewards of all prompts."""
        return self._memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rewards of all prompts."""
        self._memory.load_state_dict(state)


def _greedy_rewards(inputs: BaselineInputs) -> list[float]:
    """Return the rewards of the greedy responses; none where there are none."""
    return [] if inputs.greedy_reward is None else cast("list[float]", inputs.greedy_reward.tolist())


def _places(inputs: BaselineInputs, kind: type) -> list[int]:
    if inputs.prompts is None:
        raise UserError(
            f"model.advantage.baseline {kind.__name__} remembers prompts, and the data loader does not tell their"
            " places in the data set: set PromptBatch.indices, or take another baseline"
        )
    return inputs.prompts


KINDS: dict[str, Callable[[], Baseline]] = {
    "greedy": Greedy,
    "none": NoBaseline,
    "batch_mean": BatchMean,
    "group_mean": GroupMean,
    "leave_one_out": LeaveOneOut,
    "optimal_constant": OptimalConstant,
    "optimal_per_token": OptimalPerToken,
    "shrinkage": Shrinkage,
    "greedy_and_samples": GreedyAndSamples,
    "calibrated_greedy": CalibratedGreedy,
    "cached_greedy": CachedGreedy,
    "tracker": Tracker,
}
"""The baselines by their short names."""
