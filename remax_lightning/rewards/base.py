"""What a reward is, the check that every score passes before anything is trained on it, and waiting for coroutines."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remax_lightning.errors import RewardError, SignalExit, UserError
from remax_lightning.rewards.child_process import CallFailedError, failing_line

_SHOWN_CHARACTERS = 200


class Scores(NamedTuple):
    """Rewards of `M` responses.

    Args:
        reward: `[M]` float32, what is trained on.
        parts: named parts of it, each `[M]` float32, for the logs; empty where there is one part only.
    """

    reward: Tensor
    parts: dict[str, Tensor]


class Reward(ABC):
    """Scores responses. Subclass it, implement `score`, name your class under `model.reward.class_path`."""

    skips_none: bool = False
    """Whether None among its scores says that it does not apply to a response, as it does in TRL."""
    is_async: bool = False
    """Whether it mostly waits for others, so that parts of a `WeightedReward` can wait at the same time."""

    compares: bool = False
    """Whether it compares a response with the greedy one, its `baseline` (see `remax_lightning.types.Response`)."""

    normalized_weights: dict[str, float] | None = None
    """Weights by part where training normalizes the parts before it sums them; None trains on the reward itself."""

    def load(self, device: torch.device) -> None:  # noqa: B027
        """Load what scoring needs onto `device`; called once, before the first `score`. Default: nothing."""

    def check_prompts(self, prompts: Sequence[str]) -> None:  # noqa: B027
        """Refuse prompts that cannot be scored, before any model is loaded. Default: nothing.

        Args:
            prompts: one of each form that the data has; a `Prompt` knows the messages that it was made of.

        Raises:
            UserError: if there is one.
        """

    def check_rows(self, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> None:  # noqa: B027
        """Refuse rows that cannot be scored, before any model is loaded. Default: nothing.

        Args:
            rows: the first rows of the data that will be scored.
            places: where each stands, for messages: `train.jsonl, line 7`.

        Raises:
            UserError: if there is one.
        """

    @abstractmethod
    def score(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> Scores | Tensor | Sequence[float]:
        """Return one finite number per response.

        Args:
            prompts: `M` prompts as text; a prompt with several responses stands there several times. One that was made
                of messages has them: `prompt.conversation.messages` (see `remax_lightning.types.Prompt`).
            responses: `M` responses as text, decoded behind their prompts; without special tokens unless
                `model.sampling.skip_special_tokens` is false. Each knows the greedy response to its prompt,
                `response.baseline`, where there are greedy responses (see `remax_lightning.types.Response`).
            rows: `M` raw rows of the data set.
        """

    def __repr__(self) -> str:
        """What error messages call this reward."""
        return type(self).__name__


def shorten(text: str) -> str:
    """Return `text` quoted on one line, cut to about 200 characters, both ends kept, for error messages."""
    half = _SHOWN_CHARACTERS // 2
    return repr(text if len(text) <= 2 * half else f"{text[:half]} ... {text[-half:]}")


def checked_scores(
    reward: Reward, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]
) -> Scores:
    """Score `M` responses and refuse whatever must not be trained on.

    Args:
        reward: scores the responses.
        prompts: `M` prompts as text.
        responses: `M` responses as text.
        rows: `M` raw rows of the data set.

    Returns:
        The reward and its parts, `[M]` float32 each, detached, on the device where `reward` left them.

    Raises:
        RewardError: if the reward raises, or returns another number of scores, another shape, something that
            is not a number, None, NaN or infinity. The message shows the prompt and the response.
        ValueError: if the three sequences are not equally long.
    """
    scores, applies = applicable_scores(reward, prompts, responses, rows)
    if not applies.all():
        index = int((~applies).nonzero()[0])
        raise RewardError(
            f"model.reward: {reward!r} returned None at index {index}, so it does not apply there, and nothing else "
            f"scores the response{example_lines(prompts, responses, index)}\nReturn a number, or make it a part of a "
            "WeightedReward beside a part that scores the response."
        )
    return scores


def applicable_scores(
    reward: Reward, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]
) -> tuple[Scores, Tensor]:
    """Score `M` responses like `checked_scores`, but let a reward with `skips_none` leave responses out.

    Returns:
        The scores, 0 where the reward returned None, and `[M]` bool on the CPU, False there.
    """
    if not len(prompts) == len(responses) == len(rows):
        lengths = f"{len(prompts)}, {len(responses)} and {len(rows)}"
        raise ValueError(f"prompts, responses and rows must be equally long, got {lengths}")
    # ---- Scores, perhaps with parts ----
    result = _raw_scores(reward, prompts, responses, rows)
    parts: Any = {}
    if isinstance(result, Scores):
        result, parts = result
    if not isinstance(parts, dict):
        raise RewardError(f"model.reward: {reward!r} must return its parts as a dict, got {type(parts).__name__}")
    # ---- None in TRL's sense: the reward does not apply to the response ----
    applies = torch.ones(len(responses), dtype=torch.bool)  # [M]
    result = _without_index(result)
    if reward.skips_none and isinstance(result, list | tuple) and len(result) == len(responses):
        applies = torch.tensor([value is not None for value in result], dtype=torch.bool)
        result = [0.0 if value is None else value for value in result]
    # ---- One finite number per response, in every part ----
    scores = Scores(
        _checked(reward, None, result, prompts, responses),
        {name: _checked(reward, name, part, prompts, responses) for name, part in parts.items()},
    )
    return scores, applies


def _raw_scores(
    reward: Reward, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]
) -> Any:
    """Return what `reward` returns; whatever it raises becomes a RewardError."""
    try:
        return reward.score(prompts, responses, rows)
    except (UserError, SignalExit):
        raise
    except (Exception, SystemExit) as error:  # sys.exit() in a reward must not look like the success of a run
        index = failing_row(reward, type(error), prompts, responses, rows)
        raise RewardError(
            f"model.reward: {reward!r} raised {_describe(error)}"
            f"{example_lines(prompts, responses, index)}\nMake it return one finite number per response."
        ) from error


def _describe(error: BaseException) -> str:
    """Return an exception with the line of the user's code that it comes from."""
    text = str(error) if isinstance(error, CallFailedError) else f"{type(error).__name__}: {error}".rstrip(": ")
    place = failing_line(error)
    return text if place is None else f"{text} ({place})"


def _checked(reward: Reward, part: str | None, scores: Any, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """Return the scores of a reward, or of a part of it, as `[M]` float32, or raise a RewardError that names both."""
    count = len(responses)

    def error(what: str, index: int | None = None) -> RewardError:
        name = f"{reward!r}" if part is None else f"{reward!r}, part {part!r},"
        return RewardError(
            f"model.reward: {name} returned {what}; expected {count} finite numbers, one per response"
            f"{example_lines(prompts, responses, index)}"
        )

    # ---- A sequence is checked value by value, so that the message can name the response ----
    scores = _without_index(scores)
    if isinstance(scores, Sequence) and not isinstance(scores, str | bytes):
        for index, value in enumerate(scores):
            if not _is_number(value):
                description = f"{shorten(str(value))} (a {type(value).__name__}) at index {index}"
                raise error(description, index if index < count else None)
        scores = [float(value) for value in scores]
    try:
        tensor = torch.as_tensor(scores).detach()  # [M], as is checked below
    except Exception:  # text, a dict, None, a NumPy array of objects
        raise error(f"a {type(scores).__name__}: {shorten(str(scores))}") from None
    # ---- Shape and values of the tensor ----
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        raise error("complex numbers")
    if tensor.dim() != 1 or tensor.shape[0] != count:
        raise error(f"scores of shape {list(tensor.shape)}")
    tensor = tensor.to(torch.float32, copy=True)  # a reward may use its buffer again
    bad = (~tensor.isfinite()).nonzero().flatten().tolist()
    if bad:
        first = bad[0]
        raise error(f"{tensor[first].item()} at index {first} ({len(bad)} of {count} not finite)", first)
    return tensor


def _without_index(scores: Any) -> Any:
    """Return a pandas Series as an array, whatever its index, and an array of objects as a list.

    A masked array becomes a list with None where it is masked: the number below a mask is no score.
    """
    # pandas, polars, or NumPy and other sequences, which stay as they are
    array = scores.to_numpy() if hasattr(scores, "to_numpy") else scores
    if hasattr(array, "filled") and hasattr(array, "mask"):
        return array.tolist()
    is_objects = getattr(array, "ndim", 0) == 1 and str(array.dtype) == "object"
    return list(array) if is_objects else array


def _is_number(value: Any) -> bool:
    # float("0.5") and float(torch.tensor([0.5])) would pass
    if isinstance(value, str | bytes) or getattr(value, "ndim", 0) > 0:
        return False
    try:
        float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
    return True


def failing_row(
    reward: Reward,
    failure: type[BaseException],
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],
) -> int | None:
    """Find a response that makes `reward` raise `failure` by halving the batch; None if none alone does."""

    def raises(start: int, stop: int) -> bool:
        try:
            reward.score(prompts[start:stop], responses[start:stop], rows[start:stop])
        except failure:
            return True
        except (Exception, SystemExit):
            return False
        return False

    # [start, stop) fails as a whole. If neither half fails by itself, no single response is at fault.
    start, stop = 0, len(responses)
    while stop - start > 1:
        middle = (start + stop) // 2
        if raises(start, middle):
            stop = middle
        elif raises(middle, stop):
            start = middle
        else:
            return None
    return start if responses else None


def example_lines(prompts: Sequence[str], responses: Sequence[str], index: int | None) -> str:
    """Two lines that show response `index`, or the first one where no single response is at fault."""
    if not responses:
        return ""
    # without an index the first response stands for the batch
    which = f"{index}" if index is not None else "0 (the first of the batch)"
    index = index or 0
    return f"\n  prompt {which}: {shorten(prompts[index])}\n  response {which}: {shorten(responses[index])}"


_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process id
_lock = threading.Lock()


def wait_for(results: Sequence[Any]) -> list[Any]:
    """Return the results, those that are awaitable once they are there; they run at the same time.

    They run in a thread of their own, so that it works where the caller has a running event loop, as in a notebook. All
    calls share one loop for the life of the process: a client of a user's that keeps connections is bound to its loop.

    Raises:
        Exception: the first one that one of them raises, after all have ended.
    """
    # ---- Wait for those that are coroutines ----
    places = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if not places:
        return list(results)
    future = asyncio.run_coroutine_threadsafe(_gather([results[i] for i in places]), _event_loop())
    try:
        values = future.result()
    finally:
        future.cancel()  # of no effect if it is done; ends what runs if a signal ended the waiting
    # ---- In the order of the calls ----
    waited = dict(zip(places, values, strict=True))
    return [waited.get(i, result) for i, result in enumerate(results)]


def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of this process; a forked process does not have its parent's threads."""
    with _lock:
        if os.getpid() not in _loops:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
        return _loops[os.getpid()]


async def _gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    results = await asyncio.gather(*(_without_exit(awaitable) for awaitable in awaitables), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


async def _without_exit(awaitable: Awaitable[Any]) -> Any:
    """Wait, and turn `sys.exit()` into an error: it would end the loop, and whoever waits would wait for good."""
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"{type(error).__name__} in a coroutine: {error}") from error
