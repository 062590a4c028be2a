"""Functions of a user's: found by their dotted paths, what they take, and waiting for those that are asynchronous."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from remax_lightning.errors import UserError

KEY = "model.reward.init_args"
Style: TypeAlias = Literal["auto", "remax", "trl", "verl"]


# ---- Finding a function ----


def _dotted(path: str) -> str:
    """Return the dotted path that is meant by one of a file, such as `./my_module.py:my_function`; others as they are.

    A name that is not in it stands for one that the user knows.
    """
    file, _, name = path.strip().partition(":")
    if path.endswith(".py"):
        name = "my_function"  # the file alone
    folder, _, module = file.removesuffix(".py").removeprefix("./").rpartition("/")
    if folder.startswith(("/", "~", "..")):
        return f"{module}.{name or 'my_function'} with PYTHONPATH={folder}"
    return ".".join(part for part in (*folder.split("/"), module, name) if part)


def import_function(path: str, key: str = f"{KEY}.function") -> Callable[..., Any]:
    """Return the function at a dotted path; modules in the current directory are found too.

    Args:
        path: such as `my_module.my_function`.
        key: of the configuration, for messages.

    Raises:
        UserError: if there is no such function, or its module cannot be imported.
    """
    # ---- "my_rewards.politeness" -> module "my_rewards", function "politeness" ----
    module_name, _, name = path.rpartition(".")
    meant = _dotted(path)
    if not module_name or not name or meant != path:
        hint = f"; did you mean {meant}?" if "." in meant else ""
        raise UserError(f"{key}: expected a dotted path such as my_module.my_function, got {path!r}{hint}")
    # Appended, not put first: no file of the user's may shadow an installed package that is imported later.
    directory = str(Path.cwd())
    if directory not in sys.path and "" not in sys.path:
        sys.path.append(directory)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # "my_rewards" or a package around it is missing; anything else is missing inside of the module.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _broken_module(key, module_name, error) from error
        raise UserError(
            f"{key}: {path!r} names the module {module_name!r}, and there is none. "
            f"Put {module_name.replace('.', '/')}.py into {directory} or on PYTHONPATH, or correct the path."
        ) from error
    except (Exception, SystemExit) as error:
        raise _broken_module(key, module_name, error) from error
    # ---- The function in the module ----
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        known = ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value))
        place = getattr(module, "__file__", "built in")
        raise UserError(
            f"{key}: module {module_name!r} ({place}) has no {name!r}; its functions are: {known or 'none'}"
        )
    if not callable(function):
        raise UserError(f"{key}: expected a function, got {path!r}, a {type(function).__name__}")
    return function


def _broken_module(key: str, name: str, error: BaseException) -> UserError:
    return UserError(
        f"{key}: importing the module {name!r} failed with {type(error).__name__}: {error}. "
        f"Try `python -c 'import {name}'`."
    )


# ---- What it takes ----


class Parameters(NamedTuple):
    """What a function takes.

    Args:
        positional: names of the parameters that can be passed by position.
        required: names of those without a default.
        optional: defaults of the others.
        takes_more: whether it takes any number by position.
        takes_any: whether it takes any name.
        is_known: whether it has a signature; some functions written in C have none.
    """

    positional: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    optional: Mapping[str, Any] = {}
    takes_more: bool = False
    takes_any: bool = False
    is_known: bool = True

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Parameters:
        """Return the parameters of a function."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            return cls(is_known=False)
        # (prompts, responses, rows, *, column="answer", **rest): 3 positional, `column` optional, takes any name
        kinds = {p.kind for p in parameters}
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return cls(
            tuple(p.name for p in named if p.kind is not p.KEYWORD_ONLY),
            tuple(p.name for p in named if p.default is p.empty),
            {p.name: p.default for p in named if p.default is not p.empty},
            inspect.Parameter.VAR_POSITIONAL in kinds,
            inspect.Parameter.VAR_KEYWORD in kinds,
        )

    def takes(self, name: str) -> bool:
        """Whether a value can be passed by this name."""
        return self.takes_any or name in self.required or name in self.optional


def style_of(path: str, parameters: Parameters, style: Style) -> Style:
    """Return the style that is asked for, or that the parameters show.

    Raises:
        UserError: if the function cannot be called in the style that is asked for.
    """
    if style not in get_args(Style):
        raise UserError(f"{KEY}.style: expected one of {', '.join(get_args(Style))}, got {style!r}")
    markers: dict[Style, str] = {"trl": "completions", "verl": "solution_str"}
    named = {*parameters.required, *parameters.optional}
    if style == "auto":
        # (prompts, responses, rows, completions=...) is this project's style all the same
        is_ours = parameters.positional[2:3] == ("rows",)
        style = next((known for known, name in markers.items() if name in named and not is_ours), "remax")
        if parameters.takes_any and not named and not parameters.takes_more:
            style = "trl"  # by name only, as TRL calls
        if "solution_strs" in named:  # plural: verl's batches
            raise UserError(
                f"{KEY}.function: {path} takes whole batches, as verl's BatchRewardManager passes them; give the"
                " function of one response, compute_score(data_source, solution_str, ground_truth, extra_info)"
            )
        _refuse_other_orders(path, parameters)
    elif style in markers and not parameters.takes(markers[style]):
        raise UserError(
            f"{KEY}.style: {style} calls the function with {markers[style]!r}, and {path} takes"
            f" ({', '.join(parameters.positional)}); set the style of its parameters, or auto"
        )
    return style


def _refuse_other_orders(path: str, parameters: Parameters) -> None:
    """Refuse functions whose first parameters are other things than the lists that they would be passed by position.

    OpenRLHF calls `reward_func(queries, prompts, labels)`: it would take prompts for whole texts, and responses for
    prompts, and return numbers all the same.
    """
    lists = ("prompts", "responses", "rows")
    for name, own in zip(parameters.positional, lists, strict=False):
        if name in ("queries", "query") or (name in lists and name != own):
            raise UserError(
                f"{KEY}.function: {path} takes ({', '.join(parameters.positional)}), and is passed {', '.join(lists)},"
                " in this order; write a function of these that calls it"
            )


def check_arguments(path: str, parameters: Parameters, arguments: dict[str, Any]) -> None:
    """Refuse a function that cannot be called with three lists and `arguments`."""
    if not parameters.is_known:
        return
    named = (*parameters.required, *parameters.optional)
    # ---- Room for the three lists ----
    if len(parameters.positional) < 3 and not parameters.takes_more:
        taken = ", ".join(dict.fromkeys((*parameters.positional, *named)))
        raise UserError(
            f"{KEY}.function: {path} must take (prompts, responses, rows, ...), or (completions, ...) as in TRL, or"
            f" (solution_str, ...) as in verl; it takes ({taken})"
        )
    # ---- Arguments that it does not take, and arguments that it needs ----
    options = [name for name in named if name not in parameters.positional[:3]]
    unknown = [name for name in arguments if name not in options]
    if unknown and (not parameters.takes_any or unknown[0] in parameters.positional[:3]):
        known = ", ".join(options) or "none"
        raise UserError(f"{KEY}.arguments.{unknown[0]}: {path} has no such argument; its arguments are: {known}")
    missing = [name for name in options if name in parameters.required and name not in arguments]
    if missing:
        raise UserError(f"{KEY}.arguments.{missing[0]}: {path} cannot do without this argument; give it a value")


# ---- Waiting for coroutines ----


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
