"""Waiting for coroutines from code that is not asynchronous."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Sequence
from typing import Any

_loops: dict[int, asyncio.AbstractEventLoop] = {}
_lock = threading.Lock()


def wait_for(results: Sequence[Any]) -> list[Any]:
    """Return the results, those that are awaitable once they are there; they run at the same time.

    They run in a thread of their own, so that it works where the caller has a running event loop, as in a notebook. All
    calls share one loop for the life of the process: a client of a user's that keeps connections is bound to its loop.

    Raises:
        Exception: the first one that one of them raises, after all have ended.
    """
    places = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if not places:
        return list(results)
    future = asyncio.run_coroutine_threadsafe(_gather([results[i] for i in places]), _event_loop())
    try:
        values = future.result()
    finally:
        future.cancel()  # of no effect if it is done; ends what runs if a signal ended the waiting
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
