"""What a baseline is: the class to extend, what it may read, and what it is told after training on a rollout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor

from remax_lightning.errors import UserError


class BaselineInputs(NamedTuple):
    """What a baseline may read: the scores of the rollout batch of all ranks, float64 on the CPU.

    Args:
        reward: `[S]` rewards of the sampled responses, those of one prompt next to each other.
        num_samples: sampled responses per prompt, `n`.
        greedy_reward: `[B]` rewards of the greedy responses; None where none were generated.
        lengths: `[S]` tokens of the sampled responses.
        prompts: `[B]` places of the prompts in their data set; None where the loader does not tell them.
        squared_norms: `[S, R]` squared norms of the gradients of the log-probs at their logits, 0 beyond the end; None
            unless the baseline reads gradients.
    """

    reward: Tensor
    num_samples: int
    greedy_reward: Tensor | None
    lengths: Tensor
    prompts: list[int] | None
    squared_norms: Tensor | None = None

    @property
    def greedy(self) -> Tensor:
        """The rewards of the greedy responses, which a baseline that asks for them may rely on."""
        return cast(Tensor, self.greedy_reward)


class Measurement(NamedTuple):
    """What training on a rollout has shown, the same on all ranks.

    Args:
        squared_norms: `[S]` squared norms of the gradients of `log π(y)` at the logits, of the responses of all ranks;
            None where they were not asked for.
        rollout_seconds: of decoding and scoring, of the slowest rank.
        training_seconds: from there to the end of the last optimizer step; None where the run was resumed in between.
    """

    squared_norms: Tensor | None
    rollout_seconds: float
    training_seconds: float | None


class Baseline(ABC):
    """Says what the reward of each sampled response is compared with.

    The gradient stays unbiased if a value does not depend on the response that it is subtracted from.
    """

    min_samples: int = 1
    """Least number of sampled responses per prompt, `n`."""
    greedy: Literal["never", "sometimes", "always"] = "never"
    """Which rollouts need greedy responses; each costs a row of decoding and a score per prompt."""
    is_unbiased: bool = True
    """Whether the expected gradient is that of the reward."""
    remembers_prompts: bool = False
    """Whether it needs the places of prompts in their data set."""
    reads_gradients: bool = False
    """Whether `values` reads `squared_norms`, which takes a pass without gradients, and returns one for each token."""
    learns_from_training: bool = False
    """Whether `observe_training` is called before the next rollout."""

    @property
    def greedy_share(self) -> float:
        """Share of the rollouts that need greedy responses, once every prompt was seen."""
        return float(self.greedy == "always")

    def needs_greedy(self, prompts: Sequence[int] | None) -> bool:  # noqa: ARG002 - for subclasses
        """Whether a rollout of these prompts needs greedy responses.

        Args:
            prompts: places of the prompts of all ranks in their data set; None where the loader does not tell them.
        """
        return self.greedy == "always"

    @abstractmethod
    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` values, or `[S, R]` of one that reads gradients, finite.

        Called once per rollout, on every rank with the same inputs.
        """

    def observe(self, inputs: BaselineInputs) -> None:  # noqa: B027
        """Learn from a rollout; called after `values`. Default: nothing."""

    def needs_norms(self, *, is_free: bool) -> bool:  # noqa: ARG002 - for subclasses
        """Whether the gradients of the rollout that was just observed are to be measured.

        Args:
            is_free: whether training runs all responses anyway; otherwise those without an advantage take a pass more.
        """
        return False

    def observe_training(self, measurement: Measurement) -> str | None:  # noqa: ARG002
        """Learn from training on the rollout that was observed last; return a line for the log, if there is one."""
        return None

    def metrics(self) -> dict[str, float]:
        """Return numbers to log at every optimizer step, under `train/`, where it `learns_from_training`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what `observe` has learned, as tensors, numbers, text and containers of them. Default: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore what `state_dict` returned. Default: nothing."""


def can_value(baseline: Baseline, inputs: BaselineInputs) -> bool:
    """Return whether the scores of a rollout are enough for a baseline."""
    is_known = inputs.prompts is not None or not baseline.remembers_prompts
    has_norms = inputs.squared_norms is not None or not baseline.reads_gradients
    if inputs.num_samples < baseline.min_samples or not is_known or not has_norms:
        return False
    return inputs.greedy_reward is not None or not baseline.needs_greedy(inputs.prompts)


def checked_values(baseline: Baseline, inputs: BaselineInputs) -> Tensor:
    """Return `[S]` float64 values of a baseline, or `[S, R]`, and refuse what must not be trained on.

    Raises:
        UserError: if they have another shape, or are not finite.
    """
    values: Any = baseline.values(inputs)
    shape = inputs.reward.shape if inputs.squared_norms is None else inputs.squared_norms.shape
    unit = "response" if inputs.squared_norms is None else "token"
    expected = f"{shape.numel()} finite numbers, one per sampled {unit}"
    name = f"model.advantage.baseline {type(baseline).__name__}"
    if not isinstance(values, Tensor) or values.shape != shape:
        got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise UserError(f"{name} must return a tensor of {expected}, got {got}")
    result: Tensor = values.detach().double().cpu()
    if not result.isfinite().all():
        raise UserError(f"{name} must return {expected}, got {result[~result.isfinite()][0].item()}")
    return result
