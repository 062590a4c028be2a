"""A vLLM server as the trainer sees it: its HTTP endpoints, its answers as plain values, its errors in one line."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from remax_lightning.errors import UserError

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)
T = TypeVar("T")

KEY = "model.rollout.init_args"
SHORT = 30.0
"""Seconds for a request that makes no responses and moves no weights."""
_POLL = 0.2
"""Seconds between two looks at a server that is waited for."""
_MAY_RETURN = (408, 429, 500, 502, 503, 504)
"""Statuses of a server that is busy, restarts or has lost its engine."""


class ServerGoneError(Exception):
    """A server did not answer, or said that it cannot now; it may come back.

    Args:
        message: what happened.
        status: of its answer; None where it did not answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RefusedError(UserError):
    """A server refused a request.

    Args:
        message: for the user.
        status: of the answer.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class MissingError(Exception):
    """A server has no such endpoint, model or adapter."""


class ClientOptions(NamedTuple):
    """How servers are spoken to.

    Args:
        timeout: seconds that a request for one response may take in all, also if it drips in.
        transfer_timeout: seconds that loading weights may take.
        restart_timeout: seconds that a server is waited for.
        concurrency: requests under way at once at one server.
        retries: how often a server is asked again.
        api_key_env: environment variable with the key; None without one.
        ca_file: certificates to check a server's with; None takes the usual ones.
    """

    timeout: float
    transfer_timeout: float
    restart_timeout: float
    concurrency: int
    retries: int
    api_key_env: str | None
    ca_file: str | None


class ServerInfo(NamedTuple):
    """What a server tells about itself.

    Args:
        model: name that requests for the policy have.
        max_model_len: tokens of a prompt with its response, at most.
        dtype: of its weights, such as `bfloat16`; None where it does not tell.
        logprobs_mode: which log-probs it returns, `raw_logprobs` or `processed_logprobs`.
        transfer_backend: how it takes weights; None if it takes none.
        max_lora_rank: largest rank of an adapter that it takes; None if it takes none.
        device: that it computes on, such as `cuda` or `cpu`.
    """

    model: str
    max_model_len: int
    dtype: str | None
    logprobs_mode: str
    transfer_backend: str | None
    max_lora_rank: int | None
    device: str


class VLLMServer:
    """One server.

    Args:
        url: where it listens, such as `http://node7:8000`.
        options: how it is spoken to.

    Raises:
        UserError: if the URL is none.
    """

    def __init__(self, url: str, options: ClientOptions) -> None:
        from remax_lightning.http_client import DeadlineAdapter, Session  # here: without servers, nothing needs it

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{KEY}.urls must begin with http:// or https:// and a host, got {url!r}")
        if parts.username is not None:
            raise UserError(
                f"{KEY}.urls must hold no name or password, which are saved with the configuration, at"
                f" {parts.hostname}; put the key into an environment variable, and its name into {KEY}.api_key_env"
            )
        # The address of the OpenAI API is a common paste; the endpoints for weights are beside it.
        self.url, self.options = url.rstrip("/").removesuffix("/v1"), options
        self.recovery = threading.Lock()
        """Held by the one thread that waits for the server and brings its weights up to date."""
        self.revive: Callable[[], None] | None = None
        """Starts the server where it does not run; None where somebody else does."""
        self._session, self._sockets = Session(), set[socket.socket]()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, DeadlineAdapter(options.concurrency + 1, self._sockets))
        # A proxy of the environment knows nothing of this machine, where vLLM listens by default.
        self._proxies = {"no_proxy": parts.hostname} if _is_here(parts.hostname) else {}

    def __repr__(self) -> str:
        """What messages call this server."""
        return f"model.rollout: the server {self.url}"

    # ---- Requests ----

    def abort(self) -> None:
        """Close all connections: requests under way end at once, and vLLM gives up on their responses."""
        from remax_lightning.http_client import shut

        for connection in self._sockets.copy():
            shut(connection)

    def insist(self, action: Callable[[], T], what: str, stop: threading.Event | None = None) -> T:
        """Return what an action returns; while the server is gone it is waited for, and the action begins again.

        Args:
            action: asks this server.
            what: it is asked for, for messages.
            stop: ends the waiting when it is set.

        Raises:
            UserError: if the server stays away, refuses, has no such endpoint, or is gone again at every try.
        """
        problem, tries, stop = "", self.options.retries + 1, stop or threading.Event()
        for attempt in range(tries):
            if attempt:
                stop.wait(pause_before(attempt))
                self.wait(problem, stop)
            try:
                return action()
            except ServerGoneError as error:
                problem = str(error)
            except MissingError as error:
                raise UserError(
                    f"{self!r} has no endpoint for {what} ({error}); start it with `remax serve`, and take a vLLM of"
                    " 0.32 or later"
                ) from None
        raise UserError(f"{self!r} failed at {what} in {tries} tries ({KEY}.retries): {problem}")

    def get(self, path: str, timeout: float = SHORT) -> Any:
        """Return the answer of an endpoint; raises as `post`."""
        return self._request("GET", path, None, timeout)

    def post(self, path: str, body: Any = None, timeout: float = SHORT) -> Any:
        """Return the answer to a request, None if it is empty.

        Args:
            path: of the endpoint.
            body: is sent as JSON.
            timeout: seconds until the whole answer is there, after which the server counts as gone.

        Raises:
            ServerGoneError: if asking again later may help.
            MissingError: if the server has no such endpoint, model or adapter.
            UserError: if it refuses the request.
        """
        return self._request("POST", path, body, timeout)

    def value(self, path: str, *keys: str | int) -> Any:
        """Return a value in the answer of an endpoint; raises as `post`."""
        return self.read(path, self.get(path), *keys)

    def read(self, path: str, answer: Any, *keys: str | int) -> Any:
        """Return a value in an answer.

        Raises:
            UserError: if the answer has none there, because something else than vLLM gave it.
        """
        value = answer
        try:
            for key in keys:
                value = value[key]
        except (KeyError, IndexError, TypeError):
            raise UserError(
                f"{self!r} answered {path} without {'.'.join(map(str, keys))}: {str(answer)[:200]}; is it a vLLM server"
                " of 0.32 or later?"
            ) from None
        return value

    def _request(self, method: str, path: str, body: Any, timeout: float) -> Any:
        from remax_lightning.http_client import Deadline

        deadline = Deadline(timeout)
        try:
            with deadline:
                reply = self._session.request(
                    method,
                    self.url + path,
                    json=body,
                    auth=self._authorize,
                    timeout=(min(SHORT, timeout), timeout),  # to connect, and for each read
                    proxies=dict(self._proxies),
                    # Not that of the session, over which requests prefers the environment's (REQUESTS_CA_BUNDLE).
                    verify=self.options.ca_file,
                )
        except OSError as error:  # those of requests are some; others are of a file of certificates that is none
            raise self._failure(path, error, f"{timeout:g} s", is_late=deadline.has_passed) from None
        if deadline.has_passed:  # what came until then may look complete
            raise ServerGoneError(f"no answer to {path} within {timeout:g} s")
        return self._answer(path, reply)

    def _authorize(self, request: Any) -> Any:
        """Set the key. As an argument of its own, since requests prefers what ~/.netrc says to any header."""
        if self.options.api_key_env is not None:
            request.headers["Authorization"] = f"Bearer {os.environ.get(self.options.api_key_env, '')}"
        return request

    def _failure(self, path: str, error: OSError, limit: str, *, is_late: bool) -> Exception:
        """Return what to raise for an error of requests."""
        import requests

        if is_late or isinstance(error, requests.Timeout):
            return ServerGoneError(f"no answer to {path} within {limit}")
        if isinstance(error, requests.exceptions.SSLError):
            return UserError(
                f"{self!r} has a certificate that cannot be checked ({_reason(error)}); set {KEY}.ca_file to the"
                " certificates of its authority"
            )
        if isinstance(error, requests.exceptions.ProxyError):
            host = urlsplit(self.url).hostname
            return ServerGoneError(f"the proxy that the environment names fails ({_reason(error)}); no_proxy={host}")
        if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
            return ServerGoneError(_reason(error))
        return UserError(f"{self!r} cannot be asked: {_reason(error)}")

    def _answer(self, path: str, reply: requests.Response) -> Any:
        status, text = reply.status_code, _message(reply)
        if status == 200:
            try:
                # Behind white space, with which some gateways keep a connection open.
                return reply.json() if reply.content.lstrip().startswith((b"{", b"[")) else None
            except ValueError:
                raise UserError(f"{self!r} answered {path} with no JSON: {text}") from None
        if status == 401:
            env = self.options.api_key_env
            what = "asks for a key; name the environment variable that holds it" if env is None else f"refuses {env}"
            raise UserError(f"{self!r} {what} ({KEY}.api_key_env): {text}")
        if status == 404:
            raise MissingError(text)
        if "Location" in reply.headers:
            target = reply.headers["Location"][:200]
            raise RefusedError(f"{self!r} redirects {path} to {target}; set {KEY}.urls to where it leads", status)
        # A server whose engine refuses the content of a request answers 500, too; the retries end it.
        if status in _MAY_RETURN:
            raise ServerGoneError(f"status {status}: {text}", status)
        raise RefusedError(f"{self!r} refused {path} with status {status}: {text}", status)

    # ---- Waiting ----

    def wait(self, why: str = "", stop: threading.Event | None = None) -> None:
        """Wait until the server is up.

        Args:
            why: it is thought to be gone.
            stop: ends the waiting when it is set.

        Raises:
            UserError: if it is not up within `restart_timeout`.
        """
        end, is_told, stop = time.monotonic() + self.options.restart_timeout, False, stop or threading.Event()
        while not stop.is_set():
            if self.revive is not None:
                self.revive()
            try:
                self.get("/health", timeout=min(SHORT, max(1.0, self.options.restart_timeout)))
                return
            except (ServerGoneError, MissingError) as error:
                why = str(error) if isinstance(error, ServerGoneError) else why
                if time.monotonic() >= end:
                    raise UserError(
                        f"{self!r} does not answer since {self.options.restart_timeout:g} s"
                        f" ({KEY}.restart_timeout): {why}; is vLLM running there? Its own log says what ended it, such"
                        " as a lack of memory"
                    ) from None
            if not is_told:
                is_told = True
                log.warning("waiting up to %g s for %r: %s", self.options.restart_timeout, self, why or "no answer")
            stop.wait(_POLL)

    def version(self) -> str:
        """Return the version of vLLM; raises as `get`."""
        return str(self.value("/version", "version"))


def pause_before(attempt: int) -> float:
    """Return the seconds to wait before a server is asked again for the time `attempt`, from 1."""
    return float(min(0.1 * 2**attempt, 5.0))


def _is_here(host: str) -> bool:
    """Whether a host is this machine, by its name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: Exception) -> str:
    """Return the innermost reason of an error of requests, in one line."""
    inner: Any = error
    while getattr(inner, "args", None) and isinstance(inner.args[0], Exception):
        inner = inner.args[0]
    reason = getattr(inner, "reason", None)
    return " ".join(str(reason if isinstance(reason, Exception) else inner).split())[:300]


def _message(reply: requests.Response) -> str:
    """Return what a server says about an error, in one line."""
    try:
        content = reply.json()
    except ValueError:
        content = reply.text
    if isinstance(content, dict):
        content = content.get("error", content.get("detail", content))
    if isinstance(content, dict):
        content = content.get("message", content)
    return " ".join(str(content).split())[:300]
