"""How a chat template runs: within limits of time and memory, on messages in a form that it reads.

A template is a program of whoever published the tokenizer. Jinja's sandbox keeps it from files and code, not from loops
without an end or texts without a bound. Its documentation leaves that to the operating system, so that is what limits
a run here: an alarm signal, which also ends loops inside of C code such as powers of large numbers, and the limit on
the address space, under which an allocation fails at once. Both hold for one call only, since the process has other
work.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

from remax_lightning.data.conversations import (
    THOUGHT_MARKS,
    TOOL_FIELDS,
    Message,
    call_arguments,
    content_text,
    thoughts,
)
from remax_lightning.files import load_json

# ---- Time and memory ----


_signal: Any = None
resource: Any = None
with suppress(ImportError):  # POSIX has both
    # `signal` looks every name up in an enumeration, which takes 1 us; `_signal` has the calls beneath.
    _signal, resource = import_module("_signal"), import_module("resource")

MAX_SECONDS = 10.0
"""Time for one conversation; the templates of published models take below a millisecond."""
MAX_MEMORY = 4 * 2**30
"""Bytes that one run may add to the address space of the process, where the last batch is tokenized meanwhile."""
MAX_CHARACTERS = 50_000_000
"""Length of a text that a template writes."""


class TemplateLimitError(Exception):
    """A chat template was stopped: it ran too long, or took too much memory."""


class _Alarm(BaseException):
    """Raised by the alarm inside of the template; no `except Exception` on the way stops it."""


class _Limits:
    """The limits of this process: whether its main thread has set them, and whether a template runs right now."""

    def __init__(self) -> None:
        self.are_set = self.is_running = False

    @contextmanager
    def set(self) -> Iterator[None]:
        """Set alarm handler and memory limit inside, and restore those of the caller after it; only in the main thread.

        Between two templates the alarm does nothing.
        """
        if self.are_set:
            yield
            return
        started = time.monotonic()
        handler = _signal.signal(_signal.SIGALRM, self._ring)
        delay, interval = _signal.setitimer(_signal.ITIMER_REAL, 0.0)  # the user's own alarm, which goes on afterwards
        memory = _set_memory_limit()
        self.are_set = True
        try:
            yield
        finally:
            self.are_set = False
            if memory is not None:
                resource.setrlimit(resource.RLIMIT_AS, memory)
            _signal.setitimer(_signal.ITIMER_REAL, 0.0)
            _signal.signal(_signal.SIGALRM, _signal.SIG_DFL if handler is None else handler)
            if delay:
                _signal.setitimer(_signal.ITIMER_REAL, max(delay - (time.monotonic() - started), 1e-3), interval)

    def run(self, call: Callable[[], str]) -> str:
        """Run a call until the alarm rings, under limits that are set."""
        try:
            self.is_running = True
            # It rings again, in case that a destructor swallows the first one.
            _signal.setitimer(_signal.ITIMER_REAL, MAX_SECONDS, 1.0)
            return call()
        finally:
            self.is_running = False

    def _ring(self, signal_number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.is_running:
            raise _Alarm


_limits = _Limits()


@contextmanager
def template_limits() -> Iterator[None]:
    """Set the limits for many templates at once, which takes 20 us; each of them then costs 1 us.

    Time is limited for each template, memory for all of them together.
    """
    if _can_be_set():
        with _limits.set():
            yield
    else:
        yield


def run_template(call: Callable[[], str]) -> str:
    """Return the text that a call writes with a template.

    In a thread beside the main one, where no signal arrives, a timer interrupts the call: this costs 100 us, waits
    until a C function returns, and leaves memory alone. Rows are rendered in the main thread.

    Raises:
        TemplateLimitError: if it takes longer than `MAX_SECONDS` or more than `MAX_MEMORY`, or writes more than
            `MAX_CHARACTERS`.
    """
    try:
        if _can_be_set():
            if _limits.are_set:
                text = _limits.run(call)
            else:
                with _limits.set():
                    text = _limits.run(call)
        else:
            text = _until_interrupted(call)
    except _Alarm:
        raise TemplateLimitError(f"it runs for more than {MAX_SECONDS:g} seconds, perhaps without an end") from None
    except MemoryError:
        raise TemplateLimitError(f"it takes more memory than {MAX_MEMORY / 2**30:g} GiB") from None
    if len(text) > MAX_CHARACTERS:
        raise TemplateLimitError(f"it writes {len(text):,} characters, more than {MAX_CHARACTERS:,}")
    return text


def _can_be_set() -> bool:
    return _signal is not None and threading.get_ident() == threading.main_thread().ident


def _until_interrupted(call: Callable[[], str]) -> str:
    # The lock keeps the exception from arriving after the call: it would interrupt whatever the thread does then.
    thread, lock, done = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Alarm))

    timer = threading.Timer(MAX_SECONDS, interrupt)
    timer.daemon = True
    timer.start()
    try:
        return call()
    finally:
        with lock:
            done = True
        timer.cancel()


def _set_memory_limit() -> tuple[int, int] | None:
    """Limit the address space to what it is now and `MAX_MEMORY`; return the limits before, None if nothing is set."""
    try:
        # "size resident shared ...", in pages; the first is the address space
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    except (OSError, ValueError):  # no Linux
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MAX_MEMORY
    if any(value != resource.RLIM_INFINITY and value <= limit for value in (soft, hard)):  # the user's own is lower
        return None
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    return soft, hard


# ---- Forms of messages, and marks that show what a template leaves out ----


ARGUMENT = "probe-argument"
"""An argument that probes add to tool calls; the quotes around it show how a template writes arguments."""
_SHORT = 32
"""Length below which a content may occur in a text by chance, so that finding it proves nothing."""


class MessageForm(NamedTuple):
    """A form of the same messages; templates differ in the forms that they read."""

    content: Literal["given", "text", "parts"] = "given"
    null_is_empty: bool = False
    arguments: Literal["given", "objects", "json"] = "given"


def mark_message(message: Message, i: int) -> tuple[Message, list[tuple[str, str]]]:
    """Replace the texts of a message with marks; return the message and the marks with their fields."""
    # ---- The content: text, a list of parts, or null ----
    content, marks = message["content"], []
    marked = dict(message)
    if isinstance(content, list):
        marked["content"] = [{**part, "text": f"probe-{i}-{j}-end"} for j, part in enumerate(content)]
        marks = [("content", part["text"]) for part in marked["content"]]
    elif content is not None:
        marked["content"] = f"probe-{i}-end"
        marks = [("content", marked["content"])]
    # ---- Thoughts in fields of their own ----
    for field in thoughts(message):
        marked[field] = f"probe-{i}-{field}-end"
        marks.append((field, marked[field]))
    # ---- Calls of tools: their names are the marks, and the arguments get one more ----
    if message.get("tool_calls"):
        names = [f"probe-{i}-call-{j}-end" for j in range(len(message["tool_calls"]))]
        calls = [_with_arguments(call, _marked_arguments) for call in message["tool_calls"]]
        marked["tool_calls"] = [rename_function(call, name) for call, name in zip(calls, names, strict=True)]
        marks += [("tool_calls", name) for name in names]
    # ---- Tools and calls in other fields: one call, a list of definitions, or such a list as JSON ----
    for field in TOOL_FIELDS:
        if value := message.get(field):
            mark = f"probe-{i}-{field}-end"
            marked[field] = [rename_function(tool, mark) for tool in value] if isinstance(value, list) else mark
            if isinstance(value, dict):
                marked[field] = rename_function(value, mark)
            marks.append((field, mark))
    return marked, marks


def rename_function(tool: Any, name: str) -> Any:
    """Return a tool, or a call of one, under another name."""
    if not isinstance(tool, dict):
        return tool
    # {"type": "function", "function": {"name": ...}}, or {"name": ...} alone
    function = tool.get("function")
    return {**tool, "function": {**function, "name": name}} if isinstance(function, dict) else {**tool, "name": name}


def is_quoted(text: str, marks: list[tuple[str, str]]) -> bool:
    """Whether a text has the mark of a content within quotes, as a program prints it."""
    return any(f"{quote}{mark}{quote}" in text for field, mark in marks if field == "content" for quote in "'\"")


def message_forms(messages: Sequence[Message]) -> Iterator[MessageForm]:
    """Yield the forms that messages can be written in, the likeliest first."""
    # ---- Content: as it is, parts as text, text as parts; null as it is, or as empty text ----
    contents = [message["content"] for message in messages]
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    kinds: list[Literal["given", "text", "parts"]] = ["given"]
    kinds += ["text"] if any(isinstance(content, list) for content in contents) else []
    kinds += ["parts"] if any(isinstance(content, str) for content in contents) else []
    nulls = (False, True) if None in contents else (False,)
    # OpenAI writes arguments as JSON in a string. Most templates are made for objects, and would quote it once more;
    # others add strings up, and need it.
    # '{"city": "Fes"}' or {"city": "Fes"}
    values = [call_arguments(call) for call in calls]
    arguments: list[Literal["given", "objects", "json"]] = []
    arguments += ["objects"] if any(isinstance(value, str) for value in values) else []
    arguments += ["given"]
    arguments += ["json"] if any(isinstance(value, dict) for value in values) else []
    for written, kind, null_is_empty in product(arguments, kinds, nulls):
        yield MessageForm(kind, null_is_empty, written)


def write_in_form(message: Message, form: MessageForm) -> Message:
    """Return a message in the form that a template reads."""
    content = message["content"]
    if content is None and form.null_is_empty:
        content = ""
    if form.content == "text" and isinstance(content, list):
        content = content_text(message)
    elif form.content == "parts" and isinstance(content, str):
        # templates of models that also read images loop over parts
        content = [{"type": "text", "text": content}]
    formed = {**message, "content": content}
    if form.arguments != "given" and message.get("tool_calls"):
        change = _as_object if form.arguments == "objects" else _as_json
        formed["tool_calls"] = [_with_arguments(call, change) for call in message["tool_calls"]]
    return formed


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    """Return a tool call with changed arguments, where it has any."""
    value = call_arguments(call)
    if value is None:
        return call
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": change(value)}}
    return {**call, "arguments": change(value)}


def _as_object(arguments: Any) -> Any:
    """Return arguments as an object, where they are JSON in a string."""
    try:
        return load_json(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _as_json(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _marked_arguments(arguments: Any) -> Any:
    """Return arguments with one more, of the same kind as they are."""
    value = _as_object(arguments)
    if not isinstance(value, dict):
        return arguments
    marked = {**value, ARGUMENT: "probe"}
    return _as_json(marked) if isinstance(arguments, str) else marked


def holds_content(text: str, content: Any, *, whole: bool, by_accident: bool) -> bool:
    """Whether a text holds a content.

    Args:
        text: what a template wrote.
        content: text, a list of text parts, or None.
        whole: whether a thought inside of the content has to stand there too; that of an earlier turn need not.
        by_accident: whether the template leaves such a message out, so that a short content proves nothing.
    """
    if isinstance(content, list):
        return all(holds_content(text, part["text"], whole=whole, by_accident=by_accident) for part in content)
    if not isinstance(content, str) or not content.strip():
        return True
    if by_accident and len(content.strip()) < _SHORT:
        return False
    if content.strip() in text:
        return True
    # "<think>It is even.</think>4" -> ["", "It is even.", "4"]; of an earlier turn only the answer has to be there
    pieces = [piece.strip() for piece in THOUGHT_MARKS.split(content)]
    return all(_holds_piece(text, piece) for piece in (pieces if whole else pieces[-1:]))


def _holds_piece(text: str, piece: str) -> bool:
    """Whether a text holds a piece as it is, as JSON, or with other white space."""
    # JSON without its quotes, with and without \uXXXX in place of other letters
    if piece in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text or json.dumps(piece)[1:-1] in text:
        return True
    return "".join(piece.split()) in "".join(text.split())
