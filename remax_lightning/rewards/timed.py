"""A deadline for any reward: it scores in a child process, which is killed when a batch takes too long."""

from __future__ import annotations

import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

from remax_lightning.errors import RewardError, UserError, above, check_ranges, check_types
from remax_lightning.rewards.base import (
    Reward,
    Scores,
    applicable_scores,
    example_lines,
    failing_row,
    shorten,
    token_counts,
)
from remax_lightning.rewards.child_process import CallEndedError, CallTimeoutError, Child, Target

_KEY = "model.reward.init_args"
_ALONE_SECONDS = 5.0
"""At least so long may one response take that is scored alone, in the search for those that never end."""
Batch: TypeAlias = tuple[Sequence[str], Sequence[str], Sequence[dict[str, Any]]]
"""`M` prompts, responses and rows."""


class TimedReward(Reward):
    """Scores with another reward in a child process, which is killed when a batch takes too long.

    The child is a new Python process that imports what the reward needs and lives until the run ends or a deadline
    passes; then it is killed with all that it has started, and another one begins. So a module's state (counters,
    caches, a model on a GPU) is the child's, and code that needs the trainer's process, such as a logger's run or the
    process group, cannot be timed. What the child prints appears, and its exceptions and exits are errors here. A call
    for 64 responses costs 0.1 ms; each rank has a child of its own, of about 300 MB. It starts while
    models are loaded.

    Args:
        reward: what scores; it is sent to the child by pickling. A reward of a user's own is a class of an importable
            module, not of the script that is run.
        timeout: seconds for one batch of responses, and for the check of the rows before training. By default a minute,
            several times what graders that run tests take; the time to import is not counted.
        on_timeout: `error` ends the run and shows the response. A number is the score of each response that takes too
            long: once a batch has passed its deadline, every response is scored alone, within `timeout` / `M` or 5
            seconds, and twice `timeout` in all. Parts of a timed out response are 0; of a reward per token, the number
            stands on its last token. Use a number only where the reward judges each response by itself.

    Raises:
        UserError: if a number is out of its range, or the reward cannot be sent to another process.
    """

    is_async = True  # it waits for the child

    def __init__(
        self,
        reward: Reward,
        timeout: Annotated[float, above(0, note="seconds")] = 60.0,
        on_timeout: float | Literal["error"] = "error",
    ) -> None:
        check_types(TimedReward.__init__, {"reward": reward, "timeout": timeout, "on_timeout": on_timeout}, _KEY)
        check_ranges(TimedReward.__init__, {"timeout": timeout}, _KEY)
        if on_timeout != "error" and not (isinstance(on_timeout, int | float) and math.isfinite(on_timeout)):
            raise UserError(f"{_KEY}.on_timeout: expected error or a finite score, got {on_timeout!r}")
        self.reward, self.timeout, self.on_timeout = reward, timeout, on_timeout
        self.skips_none, self.compares = reward.skips_none, reward.compares
        self.normalized_weights = reward.normalized_weights
        if self.normalized_weights is not None and on_timeout != "error":
            raise UserError(
                f"{_KEY}.on_timeout: expected error for a reward whose parts are normalized ({_KEY}.reward.init_args."
                f"normalize std), got {on_timeout}: a response that takes too long has no parts; set timeout and"
                " on_timeout of the part that is slow"
            )
        try:
            self._pickled = pickle.dumps(reward)
        except Exception as error:
            raise UserError(
                f"{_KEY}.timeout: {reward!r} cannot be sent to another process ({type(error).__name__}: {error}); "
                "name functions by their dotted path, in place of lambdas and objects. Without a timeout the reward "
                "runs in the trainer's process, and model.stall_timeout alone ends a run that hangs"
            ) from error
        if b"__main__" in self._pickled:
            raise UserError(
                f"{_KEY}.timeout: {reward!r} is defined in the script that is run, which a child process does not"
                " import; move it to a module of its own"
            )
        self._device = torch.device("cpu")
        self._child: tuple[int, Child] | None = None  # with the id of the process that started it
        self._checking: Child | None = None  # while rows or prompts are checked
        self._lock = threading.Lock()  # parts of a WeightedReward score in threads

    def __repr__(self) -> str:
        """The reward that scores, which is what an error is about."""
        return repr(self.reward)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the child out of copies."""
        return type(self), (self.reward, self.timeout, self.on_timeout)

    def load(self, device: torch.device) -> None:
        """Start the child, which loads the reward onto `device` while training goes on being prepared."""
        self._device = device
        self._process()

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Let the reward look at the prompts, in a child process too, within `timeout` seconds."""
        if type(self.reward).check_prompts is not Reward.check_prompts:
            places = [f"the prompt {shorten(prompt)}" for prompt in prompts]
            self._check("check_prompts", (list(prompts),), places)

    def check_rows(self, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> None:
        """Let the reward look at the rows, in a child process too, within `timeout` seconds."""
        if self.checks_rows:
            self._check("check_rows", (list(rows), list(places)), places)

    @property
    def checks_rows(self) -> bool:
        """Whether the reward looks at the rows."""
        return self.reward.checks_rows

    def refused_rows(self, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> dict[int, str]:
        """Return what the reward says of each row that it refuses, in a child process too, within `timeout` seconds."""
        return dict(self._check("refused_rows", (list(rows), list(places)), places))

    def _check(self, method: str, columns: tuple[list[Any], ...], places: Sequence[str]) -> Any:
        """Return what a method says of rows or prompts; where it takes too long, find the one that does.

        The child of it loads no model: it ends with the check.

        Raises:
            RewardError: if it takes too long, or its process ends; the message names the row.
        """
        named = "check_rows" if method == "refused_rows" else method  # which the user has written

        def call(columns: tuple[list[Any], ...], seconds: float) -> tuple[Any, float]:
            """Return its result and the seconds that it took; what a new child needs to import is not counted."""
            if self._checking is None or not self._checking.is_alive:
                self._checking = Child(Target(__name__, "load_checks", self._pickled))
            try:
                self._checking.start()
                begin = time.monotonic()
                result = self._checking.call((method, columns), seconds)
            except CallEndedError as error:
                ended = f"the process of {self!r} {error} in {named}"
                raise RewardError(f"model.reward: {ended}; let it raise an error that says what is wrong") from None
            return result, time.monotonic() - begin

        def too_long(place: str) -> RewardError:
            return RewardError(
                f"{place}: model.reward: {named} of {self!r} took more than {self.timeout:g} s and was stopped; make"
                f" it faster, or raise {_KEY}.timeout"
            )

        try:
            return call(columns, self.timeout)[0]
        except CallTimeoutError:
            # ---- The first one that takes too long alone; after twice the time in all, the first of them is named ----
            left = 2 * self.timeout
            for index, place in enumerate(places if len(places) > 1 else ()):
                try:
                    left -= call(tuple([column[index]] for column in columns), min(self.timeout, _ALONE_SECONDS))[1]
                except CallTimeoutError:
                    raise too_long(place) from None
                if left <= 0:
                    break
            after = "" if len(places) == 1 else f", or one of the {len(places) - 1} after it"
            raise too_long(f"{places[0]}{after}") from None
        finally:
            if self._checking is not None:
                self._checking.close()
            self._checking = None

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> Scores | Tensor | Sequence[float] | Sequence[Sequence[float]]:
        """Return what the reward says of each response.

        Raises:
            RewardError: if it takes too long and `on_timeout` is `error`, or its process ends; the message shows the
                response.
        """
        batch = (list(prompts), list(responses), list(rows))
        with self._lock:
            try:
                return self._call(batch, self.timeout)  # type: ignore[no-any-return]
            except CallTimeoutError:
                return self._score_alone(batch)  # None of rewards that skip it
            except CallEndedError as error:
                raise self._ended(batch, error) from None

    def _process(self) -> Child:
        """Return the child; another one where it has ended, or belongs to the process that this one was forked from."""
        if self._child is None or self._child[0] != os.getpid() or not self._child[1].is_alive:
            target = Target(__name__, "load_reward", (self._pickled, str(self._device)))
            self._child = os.getpid(), Child(target)
        return self._child[1]

    def _call(self, batch: Batch, seconds: float) -> Any:
        return self._process().call(batch, seconds)

    # ---- What is done about a deadline that has passed, or a process that has ended ----

    def _score_alone(self, batch: Batch) -> Scores | list[Any]:
        """Score every response alone; those that take too long again have `on_timeout` as their score.

        Raises:
            RewardError: with the first of them, if `on_timeout` is `error`.
        """
        # ---- Time for one response, and for all of them ----
        limit = min(self.timeout, max(_ALONE_SECONDS, self.timeout / len(batch[1])))
        left = 2 * self.timeout  # of calls; what a new child needs to import is not counted
        rewards: list[float | list[float] | None] = []  # of a response, or of its tokens
        parts: dict[str, list[float]] = {}
        for index, single in enumerate(_singles(batch)):
            if left <= 0 and self.on_timeout == "error":  # no time is left for the others
                break
            scores = None
            if left > 0:
                self._process().start()
                begin = time.monotonic()
                scores = self._score_one(single, min(limit, left))
                left -= time.monotonic() - begin
            if scores is None and self.on_timeout == "error":
                raise self._timed_out(batch, index)
            # ---- Its reward, and 0 for parts that only other responses have ----
            rewards.append(float(self.on_timeout) if scores is None else scores[0])
            for name, value in (scores[1] if scores is not None else {}).items():
                # the responses before have 0 in a part that appears here first
                parts.setdefault(name, [0.0] * index).append(value)
            for values in parts.values():
                values.extend([0.0] * (index + 1 - len(values)))
        # ---- No response takes too long alone, or the time was over before one was found ----
        if len(rewards) < len(batch[1]) or self.on_timeout == "error":
            raise self._timed_out(batch, None)  # alone, none takes as long
        if any(isinstance(value, list) for value in rewards):
            rewards = _rows_of_tokens(rewards, token_counts(batch[1]) or [])
        if not parts:
            return rewards
        return Scores(cast(Tensor, rewards), {name: torch.tensor(values) for name, values in parts.items()})

    def _score_one(self, single: Batch, seconds: float) -> tuple[float | list[float] | None, dict[str, float]] | None:
        """Return reward and parts of one response, the reward None where it does not apply; None without them in time.

        Raises:
            RewardError: if the reward fails.
        """
        try:
            result = self._call(single, seconds)
        except CallTimeoutError:
            return None
        except CallEndedError as error:
            raise self._ended(single, error) from None
        # The child's result is checked as that of a reward, under the name of the real one.
        scores, applies = applicable_scores(_Returns(self, lambda *_: result), *single)
        reward = scores.reward[0].tolist() if bool(applies) else None  # a number, or one for each token
        return reward, {name: float(value) for name, value in scores.parts.items()}

    def _timed_out(self, batch: Batch, index: int | None) -> RewardError:
        return RewardError(
            f"model.reward: {self!r} took more than {self.timeout:g} s for {len(batch[1])} responses and was stopped"
            f"{example_lines(*batch[:2], index)}\nMake it faster, raise {_KEY}.timeout, or set {_KEY}.on_timeout to"
            " the score of a response that takes too long."
        )

    def _ended(self, batch: Batch, error: CallEndedError) -> RewardError:
        calls = _Returns(self, lambda *part: self._call(part, self.timeout))
        index = failing_row(calls, CallEndedError, *batch)
        return RewardError(
            f"model.reward: the process of {self!r} {error}{example_lines(*batch[:2], index)}\n"
            "Make it return one finite number per response."
        )


class _Returns(Reward):
    """Calls a function under the name of another reward."""

    def __init__(self, named: Reward, function: Callable[..., Any]) -> None:
        self.named, self.function, self.skips_none = named, function, named.skips_none

    def __repr__(self) -> str:
        return repr(self.named)

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> Any:
        return self.function(prompts, responses, rows)


def _rows_of_tokens(rewards: list[Any], lengths: Sequence[int]) -> list[Any]:
    """Return rewards per token, each as long as its response; the number of a whole response on its last token."""
    return [
        [*[0.0] * (length - 1), value] if isinstance(value, float) else value and value[:length]
        for value, length in zip(rewards, lengths, strict=True)
    ]


def _singles(batch: Batch) -> list[Batch]:
    return [([prompt], [response], [row]) for prompt, response, row in zip(*batch, strict=True)]


def load_checks(pickled: bytes) -> Callable[[tuple[str, tuple[Any, ...]]], Any]:
    """Return what a child does for each request: call a method of the reward that it was sent, which is not loaded."""
    reward: Reward = pickle.loads(pickled)  # from the trainer

    def check(request: tuple[str, tuple[Any, ...]]) -> Any:
        method, columns = request
        return getattr(reward, method)(*columns)

    return check


def load_reward(argument: tuple[bytes, str]) -> Callable[[Batch], Any]:
    """Return what a child does for each request: score a batch with the reward that it was sent."""
    pickled, device = argument
    reward: Reward = pickle.loads(pickled)  # from the trainer
    reward.load(torch.device(device))

    def score(batch: Batch) -> Any:
        with torch.no_grad():
            scores: Any = reward.score(*batch)
        if isinstance(scores, Scores):
            return Scores(_on_cpu(scores.reward), {name: _on_cpu(part) for name, part in scores.parts.items()})
        return _on_cpu(scores)

    return score


def _on_cpu(values: Any) -> Any:
    """Tensors travel as numbers, not as memory of a device."""
    return values.detach().cpu() if isinstance(values, Tensor) else values
