"""A reward that is a plain Python function, the project's or the user's, named by its dotted path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import torch
from torch import Tensor

from remax_lightning.errors import RewardError, SignalExit, UserError, above, check_ranges, check_types
from remax_lightning.rewards.base import Reward, Scores, shorten
from remax_lightning.rewards.timed import TimedReward
from remax_lightning.rewards.user_functions import (
    KEY,
    Parameters,
    Style,
    check_arguments,
    import_function,
    style_of,
    wait_for,
)

_TRAINER_ARGUMENTS = ("trainer_state", "log_extra", "log_metric", "environments")
"""What TRL's trainer passes besides texts and columns."""
_VERL_COLUMNS = ("data_source", "ground_truth", "extra_info")
_MISSING = object()


if TYPE_CHECKING:
    FunctionSource: TypeAlias = str | Callable[..., Any]
else:  # a configuration holds the dotted path; the command line reads the annotation
    FunctionSource = str
"""A function as `FunctionReward` takes it."""


def _no_function(kind: type) -> UserError:
    """Return the error about a class that is given as a function."""
    path = f"{kind.__module__}.{kind.__qualname__}"
    advice = "" if issubclass(kind, Reward) else ", after deriving it from Reward"
    return UserError(f"{KEY}.function: {path} is a class, no function; set model.reward.class_path to it{advice}")


def _name_of(function: Callable[..., Any]) -> str:
    """Return the dotted path of a function, or what comes closest for other objects that can be called."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}".replace("<locals>.", "")


class FunctionReward(Reward):
    """Scores responses with a function, whose parameters tell its style.

    `remax`: `fn(prompts, responses, rows, **arguments)` returns one number per response, or a list of lists with one
    for each token of a response, as many as `response.token_ids` has.

    `trl`, with a parameter `completions`: `fn(prompts, completions, **columns)` returns a list of numbers. It is
    passed what it names, `completion_ids` too, and every column if it takes `**kwargs`, as lists. Prompts and
    completions are lists of messages where the prompt was made of messages. None says that the function does not apply
    to a response, which another part of a `WeightedReward` then has to score.

    `verl`, with a parameter `solution_str`: `fn(data_source, solution_str, ground_truth, extra_info)` is called once
    per response and returns a number, or a dict with one under `score`. `ground_truth` is read from `reward_model`
    where the row has no such column; `extra_info` is an empty dict where there is none.

    The function may be asynchronous; verl's calls then run at the same time. All coroutines share one event loop, so
    that clients can keep their connections. None is refused in styles other than TRL's.

    A function's attribute `check_row`, if it has one, is called as `check_row(row, where, **arguments)` with the
    rows before models are loaded, and raises an error for a row that cannot be scored.

    Args:
        function: dotted path to the function, as in `my_rewards.politeness` or
            `remax_lightning.rewards.verifiers.exact_match`. Modules in the current directory are found too. From Python
            also the function itself.
        arguments: keyword arguments that every call gets.
        style: `remax`, `trl` or `verl`; `auto` tells it by the parameters.
        columns: column of a parameter where the data calls it otherwise, as in `{ground_truth: response}`; a dot leads
            into a dict. For `trl` and `verl`.
        timeout: seconds for one batch of responses, and for `check_row` before training; the function then runs in a
            child process, which is killed when they are over (`TimedReward` has the details). By default the function
            runs in the trainer's process, since it may need what is there: a model on the GPU, a logger's run, counters
            that a callback reads. A function that never returns is then ended by `model.stall_timeout`, with the whole
            run.
        on_timeout: with a `timeout`: `error`, or the score of a response that takes too long.

    Raises:
        UserError: if the function cannot be imported or called, or does not take `arguments`.
    """

    def __init__(
        self,
        function: FunctionSource,
        arguments: dict[str, Any] | None = None,
        style: Style = "auto",
        columns: dict[str, str] | None = None,
        timeout: Annotated[float | None, above(0, note="seconds")] = None,
        on_timeout: float | Literal["error"] = "error",
    ) -> None:
        # ---- The function, and the style that its parameters show ----
        if not isinstance(function, str) and not callable(function):
            raise TypeError(
                f"function must be a function or its dotted path, got {type(function).__name__} {function!r:.60}"
            )
        check_types(FunctionReward.__init__, {**locals(), "function": ""}, KEY)
        check_ranges(FunctionReward.__init__, locals(), KEY)
        self._call = import_function(function) if isinstance(function, str) else function
        if isinstance(self._call, type):
            raise _no_function(self._call)
        self._source = function
        self.function = function = function if isinstance(function, str) else _name_of(function)
        self.arguments = dict(arguments or {})
        self.columns = dict(columns or {})
        self._parameters = Parameters.of(self._call)
        self.style = style_of(function, self._parameters, style)
        self.skips_none = self.style == "trl"
        self.is_async = inspect.iscoroutinefunction(self._call) or inspect.iscoroutinefunction(
            getattr(self._call, "__call__", None)  # noqa: B004 - of an object that is called
        )
        # ---- Arguments and columns that it takes ----
        if self.style == "remax":
            check_arguments(function, self._parameters, self.arguments)
            if self.columns:
                raise UserError(f"{KEY}.columns: {function} gets whole rows and needs no columns; remove the key")
        else:
            self._check_names()
        # ---- A deadline: the same reward, without one, in a child process ----
        self.timeout, self.on_timeout = timeout, on_timeout
        self._timed: TimedReward | None = None
        if timeout is not None:
            self._timed = TimedReward(FunctionReward(self._source, arguments, style, columns), timeout, on_timeout)
            self.is_async = True
        elif on_timeout != "error":
            raise UserError(f"{KEY}.on_timeout needs {KEY}.timeout, the seconds after which a response has that score")

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the arguments: a child process imports the function again by its path."""
        arguments = (self._source, self.arguments, self.style, self.columns, self.timeout, self.on_timeout)
        return type(self), arguments

    def load(self, device: torch.device) -> None:
        """Start the child process, if the function has a timeout."""
        if self._timed is not None:
            self._timed.load(device)

    @property
    def name(self) -> str:
        """The name of the function without its module, as a part of several rewards is called."""
        return self.function.rpartition(".")[2]

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> Scores | Tensor | Sequence[float] | Sequence[Sequence[float]]:
        """Return what the function says of each response."""
        scores: Scores | Tensor | Sequence[float] | Sequence[Sequence[float]]
        # ---- In the child, or in the style of the function ----
        if self._timed is not None:
            return self._timed.score(prompts, responses, rows)
        if self.style == "verl":
            return self._verl_scores(prompts, responses, rows)
        if self.style == "trl":
            scores = self._call(**self._trl_arguments(prompts, responses, rows))
        else:  # copies: a function may take something out of a row that greedy and sampled responses share
            copies = [dict(row) for row in rows]
            scores = self._call(list(prompts), list(responses), copies, **self.arguments)
        return wait_for([scores])[0] if inspect.isawaitable(scores) else scores

    @property
    def checks_rows(self) -> bool:
        """Whether the function needs columns, or has a `check_row`."""
        return bool(self._required_columns()) or hasattr(self._call, "check_row")

    def refused_rows(self, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> dict[int, str]:
        """Return what `check_rows` says of each row that it refuses, by index; of all rows in one child process."""
        return super().refused_rows(rows, places) if self._timed is None else self._timed.refused_rows(rows, places)

    def check_rows(self, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> None:
        """Refuse rows without a column that the function needs, or with one that its `check_row` refuses.

        Raises:
            UserError: for the first such row.
        """
        for row, place in zip(rows, places, strict=True):
            for name in self._required_columns():
                self._value(row, name, place)
        check = getattr(self._call, "check_row", None)
        if check is None:
            return
        # ---- The function's own check: with a deadline, in a child process as its scores are ----
        if self._timed is not None:
            self._timed.check_rows(rows, places)
            return
        for row, place in zip(rows, places, strict=True):
            try:
                check(row, place, **self.arguments)
            except (UserError, SignalExit):
                raise
            except (Exception, SystemExit) as error:
                raise RewardError(f"{place}: {self!r}: check_row raised {type(error).__name__}: {error}") from error

    def __repr__(self) -> str:
        """The function's path: the class alone would not say which function failed."""
        return f"FunctionReward({self.function})"

    # ---- TRL's and verl's styles ----

    def _trl_arguments(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the lists that the function takes, by name."""
        # ---- Texts: lists of messages for prompts that were made of messages, as TRL passes them ----
        chats = [getattr(prompt, "conversation", None) for prompt in prompts]
        texts = {
            "prompts": [str(p) if chat is None else chat.messages for p, chat in zip(prompts, chats, strict=True)],
            "completions": [
                response if chat is None else [{"role": "assistant", "content": response}]
                for response, chat in zip(responses, chats, strict=True)
            ],
            "completion_ids": [list(getattr(response, "token_ids", None) or ()) for response in responses],
        }
        fixed = texts | self.arguments
        # ---- Columns that every row must have ----
        values = {name: value for name, value in fixed.items() if self._parameters.takes(name)}
        for name in self._required_columns():
            places = (f"the row of the prompt {shorten(prompt)}" for prompt in prompts)
            values[name] = [self._value(row, name, place) for row, place in zip(rows, places, strict=True)]
        # ---- Columns that some row has; the others have None ----
        optional = [*self._parameters.optional, *self.columns]
        if self._parameters.takes_any:
            optional += [name for row in rows for name in row if name not in ("prompt", "completion")]
        for name in dict.fromkeys(optional):
            if name in values or name in fixed or name in _TRAINER_ARGUMENTS:
                continue
            columns = [_lookup(row, self.columns.get(name, name)) for row in rows]
            if any(found for found, _ in columns):
                values[name] = [value for _, value in columns]
        return values

    def _verl_scores(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> Sequence[Any]:
        """Call the function for each response; asynchronous ones run at the same time."""
        # ---- One call per response ----
        calls = []
        for prompt, response, row in zip(prompts, responses, rows, strict=True):
            place = f"the row of the prompt {shorten(prompt)}"
            columns = {name: self._value(row, name, place) for name in _VERL_COLUMNS if self._parameters.takes(name)}
            columns = {name: value for name, value in columns.items() if value is not _MISSING}
            if "extra_info" in self._parameters.required:
                columns.setdefault("extra_info", {})
            calls.append(self._call(**columns | {"solution_str": response} | self.arguments))
        # ---- A number, or a dictionary as `{"score": 1.0, "acc": True}` ----
        results = wait_for(calls)
        for prompt, response, result in zip(prompts, responses, results, strict=True):
            if isinstance(result, dict) and "score" not in result:
                raise RewardError(
                    f"model.reward: {self!r} returned a dict with {', '.join(map(str, result)) or 'nothing'}, expected"
                    f" a number, or one under 'score'\n  prompt: {shorten(prompt)}\n  response: {shorten(response)}"
                )
        return [result["score"] if isinstance(result, dict) else result for result in results]

    def _required_columns(self) -> list[str]:
        """Return the parameters that must come from a column of every row."""
        if self.style == "remax":
            return []
        texts = ("solution_str", "extra_info") if self.style == "verl" else ("prompts", "completions", "completion_ids")
        return [name for name in self._parameters.required if name not in texts and name not in self.arguments]

    def _value(self, row: Mapping[str, Any], name: str, place: str) -> Any:
        """Return what a row holds for a parameter, or `_MISSING` where the function can do without.

        Raises:
            UserError: if it cannot.
        """
        column = self.columns.get(name, name)
        found, value = _lookup(row, column)
        if not found and name == "ground_truth" and name not in self.columns:
            # verl's data: {"reward_model": {"style": "rule", "ground_truth": "72"}}
            found, value = _lookup(row, "reward_model.ground_truth")
        if found:
            return value
        if name not in self._required_columns():
            return _MISSING
        raise UserError(
            f"{place}: {KEY}.function: {self.function} takes its parameter {name!r} from column {column!r}, and the "
            f"row has the columns {', '.join(map(str, row)) or 'none'}; name one of them in {KEY}.columns.{name}, set "
            f"{KEY}.arguments.{name} or complete the data"
        )

    def _check_names(self) -> None:
        """Refuse what the function cannot be called with, and a function that needs more than there is."""
        # ---- Keys of the configuration that the function does not take ----
        path, parameters = self.function, self._parameters
        for key, values in (("arguments", self.arguments), ("columns", self.columns)):
            for name in values:
                if not parameters.takes(name):
                    known = ", ".join((*parameters.required, *parameters.optional)) or "none"
                    raise UserError(f"{KEY}.{key}.{name}: {path} has no such argument; its arguments are: {known}")
        # ---- Parameters that no row can have ----
        required = self._required_columns()
        beyond = _TRAINER_ARGUMENTS if self.style == "trl" else [n for n in required if n not in _VERL_COLUMNS]
        for name in beyond:
            if name in required:
                given = "texts and columns of the rows" if self.style == "trl" else "the four arguments of verl"
                raise UserError(
                    f"{KEY}.function: {path} requires {name!r}, which only another trainer has; a reward gets {given}."
                    f" Give the parameter a default, or a value in {KEY}.arguments.{name}"
                )


def _lookup(row: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """Return whether a row has a column, and what it holds; a dot leads into a dict."""
    # "extra_info.answer" -> row["extra_info"]["answer"], unless a column itself has that name
    if column in row:
        return True, row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False, None
        value = value[name]
    return True, value
