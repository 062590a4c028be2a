"""A reward that is a plain Python function, the project's or the user's, named by its dotted path."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.rewards.base import Reward, Scores

_KEY = "model.reward.init_args"


class FunctionReward(Reward):
    """Scores responses with `fn(prompts, responses, rows, **arguments) -> list[float]`.

    Args:
        function: dotted path to the function, as in `my_rewards.politeness` or
            `remax_lightning.rewards.verifiers.exact_match`. Modules in the current directory are found too.
        arguments: keyword arguments that every call gets.

    Raises:
        UserError: if the function cannot be imported or called, or does not take `arguments`.
    """

    def __init__(self, function: str, arguments: dict[str, Any] | None = None) -> None:
        self.function = function
        self.arguments = dict(arguments or {})
        self._call = _import_function(function)
        _check_arguments(function, self._call, self.arguments)

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> Scores | Tensor | Sequence[float]:
        """Return what the function says of each response."""
        scores: Scores | Tensor | Sequence[float] = self._call(prompts, responses, rows, **self.arguments)
        return scores

    def __repr__(self) -> str:
        """The function's path: the class alone would not say which function failed."""
        return f"FunctionReward({self.function})"


def _import_function(path: str) -> Callable[..., Any]:
    module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise UserError(f"{_KEY}.function: expected a dotted path such as my_module.my_function, got {path!r}")
    # Appended, not put first: no file of the user's may shadow an installed package that is imported later.
    directory = str(Path.cwd())
    if directory not in sys.path and "" not in sys.path:
        sys.path.append(directory)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _broken_module(module_name, error) from error
        raise UserError(
            f"{_KEY}.function: {path!r} names the module {module_name!r}, and there is none. "
            f"Put {module_name.replace('.', '/')}.py into {directory} or on PYTHONPATH, or correct the path."
        ) from error
    except (Exception, SystemExit) as error:
        raise _broken_module(module_name, error) from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        known = ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value))
        place = getattr(module, "__file__", "built in")
        raise UserError(
            f"{_KEY}.function: module {module_name!r} ({place}) has no {name!r}; its functions are: {known or 'none'}"
        )
    if not callable(function):
        raise UserError(f"{_KEY}.function: expected a function, got {path!r}, a {type(function).__name__}")
    return function


def _broken_module(name: str, error: BaseException) -> UserError:
    return UserError(
        f"{_KEY}.function: importing the module {name!r} failed with {type(error).__name__}: {error}. "
        f"Try `python -c 'import {name}'`."
    )


def _check_arguments(path: str, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Refuse a function that cannot be called with three lists and `arguments`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return
    kinds = [p.kind for p in parameters]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 3 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        taken = ", ".join(p.name for p in parameters)
        raise UserError(f"{_KEY}.function: {path} must take (prompts, responses, rows, ...), it takes ({taken})")
    options = {p.name: p for p in [*positional[3:], *(p for p in parameters if p.kind is p.KEYWORD_ONLY)]}
    unknown = [name for name in arguments if name not in options]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        known = ", ".join(options) or "none"
        raise UserError(f"{_KEY}.arguments.{unknown[0]}: {path} has no such argument; its arguments are: {known}")
    missing = [name for name, p in options.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise UserError(f"{_KEY}.arguments.{missing[0]}: {path} cannot do without this argument; give it a value")
