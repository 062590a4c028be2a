"""A reward made of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from remax_lightning.distributed import agree_on_errors
from remax_lightning.errors import ArgumentTypeError, RewardError, UserError, check_types
from remax_lightning.rewards.base import Reward, Scores, applicable_scores, example_lines, token_counts
from remax_lightning.rewards.function import FunctionReward

_KEY = "model.reward.init_args"


if TYPE_CHECKING:
    RewardSource: TypeAlias = Reward | str | Callable[..., Any] | Sequence[Reward | str | Callable[..., Any]]
else:  # the command line reads the annotation: for it, a function's path alone is written out before it looks
    RewardSource = Reward
"""A reward as the modules take it."""


def as_reward(reward: RewardSource, argument: str = "reward") -> Reward:
    """Return the reward that is meant by an object, a function, its dotted path, or a list of these.

    Args:
        reward: a list is a `WeightedReward` with weights of 1, each part under the name of its function or class.
        argument: the name of the argument, for the message.

    Raises:
        TypeError: if it is something else, such as a class that was not called.
        UserError: if a function cannot be imported or used.
    """
    if isinstance(reward, Reward):
        return reward
    # "my_rewards.politeness", a function, or an object with `__call__`; a class would have to be called first
    if isinstance(reward, str) or (callable(reward) and not isinstance(reward, type)):
        return FunctionReward(reward)
    if isinstance(reward, list | tuple) and reward:
        parts: dict[str, Reward] = {}  # [f, f, g] -> "f", "f_1", "g"
        for number, item in enumerate(reward):
            part = as_reward(item, f"{argument}[{number}]")
            name = part.name if isinstance(part, FunctionReward) else type(part).__name__
            parts[name if name not in parts else f"{name}_{number}"] = part
        return WeightedReward(parts)
    hint = f"; call it: {reward.__name__}(...)" if isinstance(reward, type) else ""
    hint = "; WeightedReward({...}) adds named rewards up" if isinstance(reward, dict) else hint
    kind = f"the class {reward.__name__}" if isinstance(reward, type) else f"{type(reward).__name__} {reward!r:.60}"
    raise TypeError(f"{argument} must be a Reward, a function, its dotted path, or a list of these, got {kind}{hint}")


class NoReward(Reward):
    """Stands for the reward of a module that was loaded to generate; it refuses to score."""

    def score(self, *_: Any) -> list[float]:
        """Refuse to score.

        Raises:
            UserError: always.
        """
        raise UserError("the module was loaded without a reward: load_from_checkpoint(path, reward=...)")


class WeightedReward(Reward):
    """The weighted sum of named rewards, each logged under its name, parts of a part as `outer/inner`.

    A part in TRL's style may return None for responses that it does not apply to: it adds 0 there, in its logs too, and
    another part has to score the response. Asynchronous parts run at the same time.

    Args:
        parts: the rewards by name; from Python also functions.
        weights: what each is multiplied by; 1.0 where a name is left out.
        normalize: `std` brings the parts to one scale before they are summed, as GDPO does: each part's greedy value is
            subtracted from it, the difference is divided by its root mean square over the rollout batch of all ranks,
            then weighted. Weights then say how much each part counts, whatever its range. Needs
            `model.advantage.baseline: greedy`. Logs and evaluations have the plain sum. `none`, the default, trains on
            the plain sum too, whose gradient is unbiased.

    Raises:
        UserError: if there is no part, a name holds a slash, a weight is not finite or belongs to no part, or a part
            normalizes parts of its own.
    """

    def __init__(
        self,
        parts: dict[str, Reward],
        weights: dict[str, float] | None = None,
        normalize: Literal["none", "std"] = "none",
    ) -> None:
        if not isinstance(parts, dict):
            raise ArgumentTypeError(
                f"{_KEY}.parts must be a dict of rewards by name, got {type(parts).__name__} {parts!r:.60}"
            )
        parts = {name: as_reward(part, f"parts[{name!r}]") for name, part in parts.items()}
        check_types(WeightedReward.__init__, {"parts": parts, "weights": weights}, _KEY)
        weights = weights or {}
        if normalize not in ("none", "std"):
            raise UserError(f"{_KEY}.normalize: expected none or std, got {normalize!r}")
        _check_parts(parts, weights)
        self.parts, self.normalize = dict(parts), normalize
        self.weights = {name: float(weights.get(name, 1.0)) for name in parts}
        self.normalized_weights = self.weights if normalize == "std" else None
        self.compares = any(part.compares for part in parts.values())
        self._device = torch.device("cpu")

    def load(self, device: torch.device) -> None:
        """Load every part onto `device`, where the sum is made too."""
        self._device = device
        for part in self.parts.values():
            part.load(device)
        # Known only now: on one process nobody waits.
        self.waits_for_ranks = any(part.waits_for_ranks for part in self.parts.values())

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Let every part look at the prompts."""
        for part in self.parts.values():
            part.check_prompts(prompts)

    def check_rows(self, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> None:
        """Let every part look at the rows."""
        for name, part in self.parts.items():
            try:
                part.check_rows(rows, places)
            except RewardError as error:
                raise RewardError(f"part {name!r} of the reward: {error}") from error

    @property
    def checks_rows(self) -> bool:
        """Whether any part looks at the rows."""
        return any(part.checks_rows for part in self.parts.values())

    def refused_rows(self, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> dict[int, str]:
        """Return what the parts say of each row that one of them refuses, by index."""
        problems: dict[int, str] = {}
        for name, part in self.parts.items():
            for index, problem in part.refused_rows(rows, places).items():
                problems.setdefault(index, f"part {name!r} of the reward: {problem}")
        return problems

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> Scores:
        """Return the sum and every part of it.

        Raises:
            RewardError: if a part fails or returns what must not be trained on; the message names the part. If no part
                applies to a response.
        """

        def scores_of(name: str) -> tuple[Scores, Tensor]:
            try:
                return applicable_scores(self.parts[name], prompts, responses, rows)
            except RewardError as error:
                raise RewardError(f"part {name!r} of the reward: {error}") from error

        applies = torch.zeros(len(responses), dtype=torch.bool)  # [M]
        parts: dict[str, Tensor] = {}
        # ---- Parts that wait for others do so in threads, while the rest runs here ----
        waiting = [name for name, part in self.parts.items() if part.is_async]
        # A rank whose part fails would never come to the part in which the others wait for it.
        agreed = agree_on_errors if self.waits_for_ranks else nullcontext
        results: dict[str, tuple[Scores, Tensor]] = {}
        with ThreadPoolExecutor(len(waiting) or 1) as pool:
            futures = {name: pool.submit(scores_of, name) for name in waiting}
            for name in (name for name in self.parts if name not in futures):
                with agreed():
                    results[name] = scores_of(name)
            results |= {name: future.result() for name, future in futures.items()}
        # ---- A response that no part scores ----
        for _, part_applies in results.values():
            applies |= part_applies
        if not applies.all():
            index = int((~applies).nonzero()[0])
            raise RewardError(
                f"model.reward: no part scores response {index}, {', '.join(self.parts)} returned None"
                f"{example_lines(prompts, responses, index)}\nAdd a part that scores every response."
            )
        # ---- The weighted sum; beside a reward per token, a number per response stands on the last token ----
        lengths = token_counts(responses) or []
        with_tokens = [name for name, (scores, _) in results.items() if scores.reward.dim() == 2]
        if with_tokens and self.normalize != "none":
            raise UserError(
                f"{_KEY}.normalize: expected none for parts with a reward per token, got std; part {with_tokens[0]!r}"
                " has one"
            )
        total = torch.zeros((), device=self._device)  # [M], or [M, R] with rewards of tokens
        for name in self.parts:
            scores = results[name][0]
            parts[name] = scores.total.to(self._device)
            parts |= {f"{name}/{inner}": value.to(self._device) for inner, value in scores.parts.items()}
            values = scores.per_token(lengths, max(lengths)) if with_tokens else scores.reward
            total = total + self.weights[name] * values.to(self._device)
        return Scores(total, parts)


def _check_parts(parts: dict[str, Reward], weights: dict[str, float]) -> None:
    """Refuse parts and weights that do not fit together."""
    if not parts:
        raise UserError(f"{_KEY}.parts: expected at least one named reward, got none")
    for name, part in parts.items():
        if "/" in name:
            raise UserError(f"{_KEY}.parts: names hold no slash, got {name!r}; it parts a part from its own parts")
        if part.normalized_weights is not None:
            raise UserError(
                f"{_KEY}.parts.{name}.init_args.normalize: expected none in a part of another WeightedReward, got"
                f" std; name its parts in {_KEY}.parts and set {_KEY}.normalize"
            )
    for name, weight in weights.items():
        if name not in parts:
            raise UserError(f"{_KEY}.weights.{name}: no part has this name; the parts are: {', '.join(parts)}")
        if not math.isfinite(weight):
            raise UserError(f"{_KEY}.weights.{name}: expected a finite number, got {weight}")
