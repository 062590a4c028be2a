"""What a reward is, and the check that every score passes before anything is trained on it."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remax_lightning.errors import RankError, RewardError, SignalExit, UserError
from remax_lightning.rewards.child_process import CallFailedError, failing_line

_SHOWN_CHARACTERS = 200


class Scores(NamedTuple):
    """Rewards of `M` responses.

    Args:
        reward: `[M]` float32, what is trained on; or `[M, R]`, a number for every token, 0 beyond the response.
        parts: named parts of it, each `[M]` float32, for the logs; empty where there is one part only.
    """

    reward: Tensor
    parts: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """`[M]` float32, the reward of each response: the sum over its tokens, where they have rewards."""
        return self.reward if self.reward.dim() == 1 else self.reward.sum(-1)

    def per_token(self, lengths: Sequence[int], width: int) -> Tensor:
        """Return `[M, width]`, with the number of a whole response on its last token.

        Args:
            lengths: tokens of each response.
            width: of the result; at least the largest of `lengths`.
        """
        if self.reward.dim() == 2:
            tokens = self.reward[:, :width]  # beyond the longest response all is 0
            return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]))
        tokens = self.reward.new_zeros(len(lengths), width)
        last = torch.tensor(lengths, device=tokens.device) - 1
        return tokens.index_put((torch.arange(len(lengths), device=tokens.device), last), self.reward)


class Reward(ABC):
    """Scores responses. Subclass it, implement `score`, name your class under `model.reward.class_path`."""

    skips_none: bool = False
    """Whether None among its scores says that it does not apply to a response, as it does in TRL."""
    is_async: bool = False
    """Whether it mostly waits for others, so that parts of a `WeightedReward` can wait at the same time."""

    waits_for_ranks: bool = False
    """Whether `score` waits for the other ranks, as one does that runs a model in shares: every rank has to call it."""

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

        It is called several times, each time with up to 1000 of the rows that will be scored.

        Args:
            rows: some of them.
            places: where each stands, for messages: `train.jsonl, line 7`.

        Raises:
            UserError: if there is one that cannot be scored.
        """

    @property
    def checks_rows(self) -> bool:
        """Whether `check_rows` looks at anything; else no row is read for it."""
        return type(self).check_rows is not Reward.check_rows

    def refused_rows(self, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> dict[int, str]:
        """Return what `check_rows` says of each row that it refuses, by index, for runs that leave these out."""
        problems = {}
        for index, (row, place) in enumerate(zip(rows, places, strict=True)):
            try:
                self.check_rows([row], [place])
            except UserError as error:
                problems[index] = str(error)
        return problems

    @abstractmethod
    def score(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> Scores | Tensor | Sequence[float] | Sequence[Sequence[float]]:
        """Return one finite number per response, or one for each of its tokens.

        A reward per token is a list of lists, each as long as `response.token_ids`, or a tensor `[M, R]` that is 0
        beyond a response, `R` being the largest number of tokens. A reward per turn or step has its number on the last
        token of that, and 0 elsewhere. A token is credited with its own reward and all that follow.

        Args:
            prompts: `M` prompts as text; a prompt with several responses stands there several times. One that was made
                of messages has them: `prompt.conversation.messages` (see `remax_lightning.types.Prompt`).
            responses: `M` responses as text, decoded behind their prompts; without special tokens unless
                `model.sampling.skip_special_tokens` is false. Each knows its tokens, `response.token_ids`, and the
                greedy response to its prompt, `response.baseline`, where there are greedy responses (see
                `remax_lightning.types.Response`).
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
        The reward, `[M]` or `[M, R]`, and its parts, `[M]` each, float32, detached, on the device where `reward` left
        them.

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
    with _same_surroundings():
        try:
            result: Any = reward.score(prompts, responses, rows)
        except (UserError, RankError, SignalExit):
            raise
        except (Exception, SystemExit) as error:  # sys.exit() in a reward must not look like the success of a run
            raise _score_error(reward, error, prompts, responses, rows) from error
    parts: Any = {}
    if isinstance(result, Scores):
        result, parts = result
    if not isinstance(parts, dict):
        raise RewardError(f"model.reward: {reward!r} must return its parts as a dict, got {type(parts).__name__}")
    # ---- None in TRL's sense: the reward does not apply to the response ----
    applies = torch.ones(len(responses), dtype=torch.bool)  # [M]
    if reward.skips_none:
        result = _without_index(result)
        if isinstance(result, list | tuple) and len(result) == len(responses):
            applies = torch.tensor([value is not None for value in result], dtype=torch.bool)
            result = _without_none(result, responses)
    # ---- One finite number per response, in every part ----
    checked = {name: _checked(reward, name, part, prompts, responses) for name, part in parts.items()}
    totals = {name: Scores(part, {}).total for name, part in checked.items()}
    return Scores(_checked(reward, None, result, prompts, responses), totals), applies


@contextmanager
def _same_surroundings() -> Iterator[None]:
    """Restore the current folder and torch's default dtype.

    A reward that runs code in a folder of its own may leave the process there, where the run would save what follows.
    """
    if threading.current_thread() is not threading.main_thread():  # of another part: they are those of the whole reward
        yield
        return
    dtype = torch.get_default_dtype()
    try:
        folder: Path | None = Path.cwd()
    except FileNotFoundError:  # removed below the run
        folder = None
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if folder is not None:
            with suppress(OSError):
                os.chdir(folder)


def _score_error(
    reward: Reward,
    error: BaseException,
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],
) -> RewardError:
    """Return the error about a reward that has raised one, with a response that makes it do so."""
    # The search would call `score` on one rank alone.
    index = None if reward.waits_for_ranks else failing_row(reward, type(error), prompts, responses, rows)
    row = rows[index or 0] if rows else {}
    # The most frequent mistake: a column by another name.
    is_column = isinstance(error, KeyError) and not any(name in row for name in error.args)
    columns = f"\n  columns of its row: {', '.join(map(str, row)) or 'none'}" if is_column else ""
    return RewardError(
        f"model.reward: {reward!r} raised {_describe(error)}"
        f"{example_lines(prompts, responses, index)}{columns}\nMake it return one finite number per response."
    )


def _describe(error: BaseException) -> str:
    """Return an exception with the line of the user's code that it comes from."""
    text = str(error) if isinstance(error, CallFailedError) else f"{type(error).__name__}: {error}".rstrip(": ")
    place = failing_line(error)
    return text if place is None else f"{text} ({place})"


class _Problem(NamedTuple):
    """Makes the error about what a reward has returned."""

    reward: Reward
    part: str | None
    prompts: Sequence[str]
    responses: Sequence[str]

    def error(self, what: str, index: int | None = None, expected: str = "") -> RewardError:
        """Return the error; `index` is the response that it is about."""
        name = f"{self.reward!r}" if self.part is None else f"{self.reward!r}, part {self.part!r},"
        count = len(self.responses)
        index = None if index is None or index >= count else index
        return RewardError(
            f"model.reward: {name} returned {what}; expected"
            f" {expected or f'{count} finite numbers, one per response'}"
            f"{example_lines(self.prompts, self.responses, index)}"
        )

    def unfit(self, value: Any, index: int, place: str = "", expected: str = "") -> RewardError:
        """Return the error about a value that is no number, or no list among lists."""
        what = "None" if value is None else f"{shorten(str(value))} (a {type(value).__name__})"
        return self.error(f"{what} at index {index}{place}", index, expected)


def _checked(reward: Reward, part: str | None, scores: Any, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """Return the scores of a reward, or of a part of it, as float32, or raise a RewardError that names both.

    They are `[M]`, or `[M, R]` with a number for each token.
    """
    count, lengths, problem = len(responses), token_counts(responses), _Problem(reward, part, prompts, responses)
    tensor = _as_tensor(scores, lengths, problem)
    # ---- The shape: [M], or where tokens are known at least as wide as the longest response ----
    longest = max(lengths or [0])
    has_tokens = lengths is not None and tensor.dim() == 2 and tensor.shape[1] >= longest
    if (tensor.dim() != 1 and not has_tokens) or tensor.shape[0] != count:
        known = "" if lengths is None else f", or of shape [{count}, {longest}], one per token"
        expected = f"{count} finite numbers, one per response{known}"
        raise problem.error(f"scores of shape {list(tensor.shape)}", expected=expected)
    # ---- The values ----
    tensor = tensor.to(torch.float32, copy=True)  # a reward may use its buffer again
    bad = (~tensor.isfinite()).nonzero().tolist()
    if bad:
        place = ", token ".join(map(str, bad[0]))  # "3", or "3, token 7"
        values = tensor.numel() if has_tokens else count
        what = f"{tensor[tuple(bad[0])].item()} at index {place} ({len(bad)} of {values} not finite)"
        raise problem.error(what, bad[0][0])
    if lengths is not None and has_tokens:
        places = torch.arange(tensor.shape[1], device=tensor.device)
        beyond = places >= torch.tensor(lengths, device=tensor.device)[:, None]  # [M, R]
        for index, token in (beyond & (tensor != 0)).nonzero().tolist()[:1]:
            what = f"{tensor[index, token].item()} at index {index}, token {token}"
            raise problem.error(what, index, f"0 beyond the {lengths[index]} tokens of the response")
    return tensor


def _as_tensor(scores: Any, lengths: list[int] | None, problem: _Problem) -> Tensor:
    """Return scores of any kind as a tensor of real numbers, lists per token padded with 0."""
    scores = scores if isinstance(scores, list) else _without_index(scores)
    # ---- A sequence is checked value by value, so that the message can name the response ----
    if isinstance(scores, Sequence) and not isinstance(scores, str | bytes):
        if all(type(value) is float for value in scores):  # as most rewards return them
            scores = list(scores)
        elif lengths is not None and any(_is_row(value) for value in scores):
            scores = _padded_rows(scores, lengths, problem)
        else:
            for index, value in enumerate(scores):
                if not _is_number(value):
                    raise problem.unfit(value, index)
            scores = [float(value) for value in scores]
    try:
        tensor = torch.as_tensor(scores).detach()
    except Exception:  # text, a dict, None, a NumPy array of objects
        what = "None (is a return missing?)" if scores is None else f"a {type(scores).__name__}: {shorten(str(scores))}"
        raise problem.error(what) from None
    if tensor.is_complex():
        raise problem.error("complex numbers")
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def token_counts(responses: Sequence[str]) -> list[int] | None:
    """Return the number of tokens of each response; None where they are not known."""
    tokens = [getattr(response, "token_ids", None) for response in responses]
    known = [ids for ids in tokens if ids is not None]
    return [len(ids) for ids in known] if len(known) == len(tokens) else None


def _padded_rows(rows: Sequence[Any], lengths: list[int], problem: _Problem) -> list[list[float]]:
    """Return a reward per token as rows of equal length, with 0 beyond each response."""
    if len(rows) != len(lengths):
        raise problem.error(f"{len(rows)} lists", expected=f"{len(lengths)} lists, one per response")
    padded = []
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        expected = f"a list of {length} finite numbers, one for each token in response.token_ids"
        if not _is_row(row):
            raise problem.unfit(row, index, " beside lists", expected)
        values = list(row)
        if len(values) != length:
            what = f"a list of {len(values)} at index {index}, where the response has {length} tokens"
            raise problem.error(what, index, f"{expected}, or one number per response")
        for token, value in enumerate(values):
            if not _is_number(value):
                raise problem.unfit(value, index, f", token {token}", expected)
        padded.append([float(value) for value in values] + [0.0] * (max(lengths) - length))
    return padded


def _is_row(value: Any) -> bool:
    """Whether a value among scores is itself a row of them."""
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return is_sequence or getattr(value, "ndim", 0) == 1


def _without_none(scores: Sequence[Any], responses: Sequence[str]) -> list[Any]:
    """Return scores with 0 where there is None: for every token, where others have rewards per token."""
    lengths = token_counts(responses)
    if lengths is None or not any(_is_row(value) for value in scores):
        lengths = None
    zeros = [0.0] * len(scores) if lengths is None else [[0.0] * length for length in lengths]
    return [zero if value is None else value for value, zero in zip(scores, zeros, strict=True)]


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
