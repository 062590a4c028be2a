"""A vLLM server as the trainer sees it: its HTTP endpoints, its answers as plain values, its errors in one line."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from remax_lightning.errors import UserError

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

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
        timeout: seconds that a request for one response may take.
        transfer_timeout: seconds that loading weights may take.
        restart_timeout: seconds that a server is waited for.
        concurrency: requests under way at once at one server.
        api_key_env: environment variable with the key; None without one.
        ca_file: certificates to check a server's with; None takes the usual ones.
    """

    timeout: float
    transfer_timeout: float
    restart_timeout: float
    concurrency: int
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
        has_lora: whether it takes adapters.
        device: that it computes on, such as `cuda` or `cpu`.
    """

    model: str
    max_model_len: int
    dtype: str | None
    logprobs_mode: str
    transfer_backend: str | None
    has_lora: bool
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
        import requests  # here: without servers, nothing needs it
        from requests.adapters import HTTPAdapter

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"{KEY}.urls must begin with http:// or https:// and a host, got {url!r}")
        # The address of the OpenAI API is a common paste; the endpoints for weights are beside it.
        self.url, self.options = url.rstrip("/").removesuffix("/v1"), options
        self.recovery = threading.Lock()
        """Held by the one thread that waits for the server and brings its weights up to date."""
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=options.concurrency + 1))
        if options.ca_file is not None:
            self._session.verify = options.ca_file

    def __repr__(self) -> str:
        """What messages call this server."""
        return f"model.rollout: the server {self.url}"

    # ---- Requests ----

    def get(self, path: str, timeout: float = SHORT) -> Any:
        """Return the answer of an endpoint; raises as `post`."""
        return self._request("GET", path, None, timeout)

    def post(self, path: str, body: Any = None, timeout: float = SHORT) -> Any:
        """Return the answer to a request, None if it is empty.

        Args:
            path: of the endpoint.
            body: is sent as JSON.
            timeout: seconds without a byte of the answer, after which the server counts as gone.

        Raises:
            ServerGoneError: if asking again later may help.
            MissingError: if the server has no such endpoint, model or adapter.
            UserError: if it refuses the request.
        """
        return self._request("POST", path, body, timeout)

    def _request(self, method: str, path: str, body: Any, timeout: float) -> Any:
        import requests

        headers = {}
        if self.options.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.options.api_key_env, '')}"
        try:
            reply = self._session.request(
                method, self.url + path, json=body, headers=headers, timeout=timeout, allow_redirects=False
            )
        except requests.exceptions.SSLError as error:
            raise UserError(
                f"{self!r} has a certificate that cannot be checked ({_reason(error)}); set {KEY}.ca_file to the"
                " certificates of its authority"
            ) from None
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise ServerGoneError(_reason(error)) from None
        except (requests.RequestException, OSError) as error:  # OSError: a file of certificates that is none
            raise UserError(f"{self!r} cannot be asked: {_reason(error)}") from None
        return self._answer(path, reply)

    def _answer(self, path: str, reply: requests.Response) -> Any:
        status, text = reply.status_code, _message(reply)
        if status == 200:
            try:
                return reply.json() if reply.content.startswith((b"{", b"[")) else None
            except ValueError:
                raise UserError(f"{self!r} answered {path} with no JSON: {text}") from None
        if status == 401:
            env = self.options.api_key_env
            what = "asks for a key; name the environment variable that holds it" if env is None else f"refuses {env}"
            raise UserError(f"{self!r} {what} ({KEY}.api_key_env): {text}")
        if status == 404:
            raise MissingError(text)
        # A server whose engine refuses the content of a request answers 500, too; the retries end it.
        if status in _MAY_RETURN:
            raise ServerGoneError(f"status {status}: {text}", status)
        raise RefusedError(f"{self!r} refused {path} with status {status}: {text}", status)

    # ---- Waiting ----

    def wait(self, why: str = "") -> None:
        """Wait until the server is up.

        Args:
            why: it is thought to be gone.

        Raises:
            UserError: if it is not up within `restart_timeout`.
        """
        end, is_told = time.monotonic() + self.options.restart_timeout, False
        while True:
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
            time.sleep(_POLL)

    # ---- What it is ----

    def describe(self, model: str | None) -> ServerInfo:
        """Return what the server is.

        Args:
            model: name of the policy there; None takes the only one.

        Raises:
            UserError: if it is no vLLM server for training, or does not serve that model.
            ServerGoneError: if it does not answer.
        """
        try:
            cards = self.get("/v1/models")["data"]
        except (MissingError, KeyError, TypeError):
            raise UserError(f"{self!r} is no vLLM server: it has no list of models at /v1/models") from None
        # An adapter has the model below it as its parent.
        bases = {card["id"]: card for card in cards if card.get("parent") is None}
        if model is None and len(bases) != 1:
            raise UserError(f"{self!r} serves {', '.join(map(repr, bases))}; name the policy in {KEY}.served_model")
        name = next(iter(bases)) if model is None else model
        if name not in bases:
            raise UserError(f"{self!r} serves {', '.join(map(repr, bases))}, not {KEY}.served_model {model!r}")
        try:
            config = self.get("/server_info?config_format=json")["vllm_config"]
            self.get("/weight_info")
        except MissingError:
            raise UserError(
                f"{self!r} has no endpoints for weights; start it with `remax serve`, or with VLLM_SERVER_DEV_MODE=1"
                " and a vLLM of 0.32 or later"
            ) from None
        return _server_info(name, bases[name], config)

    def version(self) -> str:
        """Return the version of vLLM; raises as `get`."""
        return str(self.get("/version")["version"])

    def knows_token(self, model: str, token: int) -> bool:
        """Whether a token is in the vocabulary of a model; asks for one greedy token behind it.

        Raises:
            UserError: if the server makes no responses of token ids.
            ServerGoneError: if it does not answer.
        """
        parameters = {"temperature": 0.0, "max_tokens": 1}
        try:
            self.post("/inference/v1/generate", {"model": model, "token_ids": [token], "sampling_params": parameters})
        except RefusedError as error:
            if error.status != 400:
                raise
            return False
        except MissingError:
            raise UserError(f"{self!r} takes no token ids; it needs a vLLM of 0.32 or later") from None
        return True


def _server_info(name: str, card: dict[str, Any], config: dict[str, Any]) -> ServerInfo:
    """Return what the list of models and the configuration of a server say."""
    model_config = config.get("model_config") or {}
    transfer = config.get("weight_transfer_config") or {}
    return ServerInfo(
        model=name,
        max_model_len=int(card.get("max_model_len") or model_config["max_model_len"]),
        dtype=None if model_config.get("dtype") is None else str(model_config["dtype"]).removeprefix("torch."),
        logprobs_mode=str(model_config.get("logprobs_mode", "raw_logprobs")),
        transfer_backend=transfer.get("backend"),
        has_lora=config.get("lora_config") is not None,
        device=str((config.get("device_config") or {}).get("device", "")),
    )


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
