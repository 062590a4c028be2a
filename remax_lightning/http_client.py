"""HTTP connections with a deadline for a whole request, for rewards and rollout engines that ask servers.

The `timeout` of requests bounds each single read of the socket. A server that sends a byte now and then, in its headers
or in its body, holds a request for as long as it likes. So a timer shuts the socket at the deadline, wherever the
request is, and the read that waits for it returns.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool

_current = threading.local()
"""Holds the `Deadline` of the request that this thread makes."""


class Deadline:
    """Shuts the connection of the request that is made inside, once its time is over.

    Args:
        seconds: from entering on.
    """

    def __init__(self, seconds: float) -> None:
        self.has_passed = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        _current.deadline = self
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        _current.deadline = None
        self._timer.cancel()
        with self._lock:
            self._socket = None

    def watch(self, connection: socket.socket) -> None:
        """Say which socket the request waits on."""
        with self._lock:
            self._socket = connection
        # the time was over before there was a socket
        if self.has_passed:
            self._end()

    def _end(self) -> None:
        self.has_passed = True
        with self._lock:
            if self._socket is not None:
                shut(self._socket)


def shut(connection: socket.socket) -> None:
    """Shut a connection under the read that waits for it, in whatever thread."""
    with suppress(OSError):  # the other side has closed it
        # Not the method of an SSLSocket, which takes its state from under the read that waits.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class DeadlineAdapter(HTTPAdapter):
    """Makes connections that tell the deadline of their request which socket they wait on, also through a proxy.

    Args:
        size: connections that are kept open.
        sockets: gets the open sockets of all threads. requests itself knows only the connections that wait for their
            next use, and those under way could not be closed. None if nobody asks.
    """

    def __init__(self, size: int, sockets: set[socket.socket] | None = None) -> None:
        self._pools = _pools(set() if sockets is None else sockets)
        super().__init__(pool_connections=1, pool_maxsize=size)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Let the connections be ours."""
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
        """Let the connections to a proxy be ours, but those of SOCKS, which are of another kind."""
        manager = super().proxy_manager_for(*args, **options)
        if not args[0].lower().startswith("socks"):
            manager.pool_classes_by_scheme = self._pools
        return manager


def _pools(sockets: set[socket.socket]) -> dict[str, Any]:
    def with_sockets(pool: Any) -> Any:
        class Connection(pool.ConnectionCls):  # type: ignore[misc]
            def connect(self) -> None:
                super().connect()
                self._open = self.sock
                sockets.add(self._open)

            def getresponse(self) -> Any:
                deadline: Deadline | None = getattr(_current, "deadline", None)
                if deadline is not None and self.sock is not None:
                    deadline.watch(self.sock)
                return super().getresponse()

            def close(self) -> None:
                sockets.discard(getattr(self, "_open", None))
                super().close()

        return type(pool.__name__, (pool,), {"ConnectionCls": Connection})

    return {"http": with_sockets(HTTPConnectionPool), "https": with_sockets(HTTPSConnectionPool)}


class Session(requests.Session):
    """Sees no redirects. With `allow_redirects=False` requests would still read the whole body of one."""

    def get_redirect_target(self, _: requests.Response) -> None:
        """Return none."""
        return
