"""A reward behind a URL: prompts and responses are posted as JSON, scores come back."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Annotated, Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import requests
from urllib3 import Retry
from urllib3.exceptions import InvalidHeader

from remax_lightning.errors import RewardError, UserError, above, at_least, check_ranges, check_types
from remax_lightning.files import load_json, write_json
from remax_lightning.http_client import Deadline, DeadlineAdapter, Session
from remax_lightning.rewards.base import Reward, shorten

_KEY = "model.reward.init_args"
RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Statuses of a server that may answer the same request later."""


Concurrency: TypeAlias = Annotated[int, at_least(1)]
Seconds: TypeAlias = Annotated[float, above(0, note="seconds")]
Retries: TypeAlias = Annotated[int, at_least(0)]
Backoff: TypeAlias = Annotated[float, at_least(0, note="seconds")]
"""Options of every reward that asks a server."""


class HTTPReward(Reward):
    """Scores responses by a remote scorer.

    It is posted `{"prompts": [...], "responses": [...]}`, with `"rows": [...]` where they are asked for, each of `M`
    entries, and answers with a list of `M` finite numbers, alone or as `{"scores": [...]}`. Each rank asks for itself.
    Connections are kept open between requests. Redirects are refused: the prompts, and the headers with their secrets,
    go to `url` and nowhere else.

    Args:
        url: where the scorer listens, http or https.
        batch_size: responses per request.
        concurrency: requests under way at once.
        timeout: seconds that one request may take in all, from connecting to the last byte, also if it drips in.
        retries: how often a request is repeated after a failed connection, a timeout or a busy server (status 408, 425,
            429 or 5xx). An answer that is wrong is not asked for again.
        backoff: seconds before the first repetition, doubled before each further one; a server's `Retry-After` counts
            where it is longer, up to `timeout`.
        max_bytes: of one answer; a longer one is refused before it is read.
        headers: sent with every request. They are saved with the run's configuration: a secret goes into `token_env`.
        token_env: environment variable with a bearer token for the `Authorization` header.
        send_rows: whether the raw rows of the data set are sent too; numbers that are not finite as null.

    Raises:
        UserError: if the URL is none, a number is out of its range, or the environment variable is not set.
    """

    def __init__(
        self,
        url: str,
        batch_size: Annotated[int, at_least(1)] = 64,
        concurrency: Concurrency = 4,
        timeout: Seconds = 60.0,
        retries: Retries = 3,
        backoff: Backoff = 0.5,
        max_bytes: Annotated[int, at_least(2)] = 2**24,
        headers: dict[str, str] | None = None,
        token_env: str | None = None,
        send_rows: bool = False,
    ) -> None:
        check_types(HTTPReward.__init__, locals(), _KEY)
        check_ranges(HTTPReward.__init__, locals(), _KEY)
        self.url, self.batch_size, self.concurrency, self.send_rows = url, batch_size, concurrency, send_rows
        self._client = JSONClient(
            repr(self), url, concurrency, timeout, retries, backoff, max_bytes, headers, token_env
        )

    def __repr__(self) -> str:
        """What error messages call this reward."""
        return f"HTTPReward({self.url})"

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> Sequence[float]:
        """Return the scorer's `M` scores, in the order of the responses.

        Raises:
            RewardError: if the scorer cannot be reached, or answers with anything but scores.
        """
        # ---- Requests of `batch_size` responses ----
        columns: dict[str, Sequence[Any]] = {"prompts": prompts, "responses": responses}
        if self.send_rows:
            columns["rows"] = rows
        starts = range(0, len(responses), self.batch_size)
        batches = [{name: list(values[i : i + self.batch_size]) for name, values in columns.items()} for i in starts]
        # ---- `concurrency` at a time; after a failure no further one starts ----
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                return [score for scores in pool.map(self._scores, batches) for score in scores]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _scores(self, batch: dict[str, list[Any]]) -> list[float]:
        """Return the scores of one batch, asking again as long as that may help."""
        try:
            body = write_json(batch, ensure_ascii=True).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"model.reward: {self!r} cannot send the rows as JSON: {error}") from error
        hint = f"Is the scorer running there, and quick enough for {_KEY}.batch_size {self.batch_size} within"
        return self._checked(self._client.post(body, hint), batch)

    def _checked(self, answer: bytes, batch: dict[str, list[Any]]) -> list[float]:
        count = len(batch["responses"])
        try:
            scores = load_json(answer)
        except ValueError:
            raise self._error(f"no JSON: {shorten(answer.decode(errors='replace'))}", count) from None
        if isinstance(scores, dict) and "scores" in scores:
            scores = scores["scores"]  # {"scores": [0.5, ...]} or [0.5, ...]
        if not isinstance(scores, list):
            raise self._error(f"{shorten(json.dumps(scores))}", count)
        if len(scores) != count:
            raise self._error(f"{len(scores)} scores", count)
        for index, score in enumerate(scores):
            # `true` is no score, though `bool` is a kind of `int`
            if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
                where = (
                    f"\n  prompt: {shorten(batch['prompts'][index])}\n  response: {shorten(batch['responses'][index])}"
                )
                raise self._error(f"{score!r} at index {index}", count, where)
        return [float(score) for score in scores]

    def _error(self, what: str, count: int, where: str = "") -> RewardError:
        return RewardError(
            f"model.reward: {self!r} answered with {what}; expected {count} finite numbers, one per response, as a JSON"
            f' list or as {{"scores": [...]}}{where}'
        )


class _Answer(NamedTuple):
    """What came of one request.

    Args:
        body: the answer; None where there is none.
        problem: what went wrong.
        wait: how long the server wants us to wait before we ask again; None if asking again is no use.
        status: of a server that refused the request.
    """

    body: bytes | None
    problem: str = ""
    wait: float | None = None
    status: int | None = None


class RefusedError(RewardError):
    """A server has no answer.

    Args:
        message: for the user.
        status: that the server answered with; None where it did not answer.
    """

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


class JSONClient:
    """Posts JSON to one address: with a deadline for each request, tried again where that may help, no redirects.

    Args:
        name: what messages call the reward that asks.
        url: http or https.
        concurrency: requests under way at once.
        timeout: seconds that one request may take in all.
        retries: how often a request is repeated where that may help.
        backoff: seconds before the first repetition, doubled before each further one.
        max_bytes: of one answer.
        headers: sent with every request.
        token_env: environment variable with a bearer token.
        token_key: configuration key of the latter.
        expected: what the server should answer, for messages.

    Raises:
        UserError: if the URL is none, a number is out of its range, or the environment variable is not set.
    """

    def __init__(
        self,
        name: str,
        url: str,
        concurrency: Concurrency,
        timeout: Seconds,
        retries: Retries,
        backoff: Backoff,
        max_bytes: int = 2**24,
        headers: dict[str, str] | None = None,
        token_env: str | None = None,
        token_key: str = "token_env",
        expected: str = "a list of numbers",
    ) -> None:
        # ---- Refuse values out of their range ----
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise UserError(f"{_KEY}.url must begin with http:// or https:// and a host, got {url!r}")
        check_ranges(JSONClient.__init__, locals(), _KEY)
        if token_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", token_env):
            # Perhaps the key itself, which a message must not show.
            raise UserError(
                f"{_KEY}.{token_key}: expected the name of an environment variable, got a text of {len(token_env)}"
                " characters that is none; put the key into a variable, and its name here"
            )
        if token_env is not None and not os.environ.get(token_env):
            raise UserError(f"{_KEY}.{token_key}: the environment variable {token_env} is not set; export it")
        # ---- One session, with as many open connections as requests under way ----
        self.name, self.url, self.timeout, self.expected = name, url, timeout, expected
        self.retries, self.backoff, self.max_bytes = retries, backoff, max_bytes
        self.headers, self.token_env = dict(headers or {}), token_env
        self._session = Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, DeadlineAdapter(concurrency))

    def post(self, body: bytes, hint: str) -> bytes:
        """Return the answer to one request, asking again as long as that may help.

        Args:
            body: JSON.
            hint: what the user may look at where there is no answer; the timeout comes behind it.

        Raises:
            RefusedError: if there is none.
            RewardError: if it is too long.
        """
        start = time.monotonic()
        for attempt in range(self.retries + 1):
            answer = self._post(body)
            if answer.body is not None:
                return answer.body
            if answer.wait is None or attempt == self.retries:
                break
            # 0.5, 1, 2, ... seconds; the server's Retry-After if longer; never above the timeout
            time.sleep(min(max(self.backoff * 2**attempt, answer.wait), self.timeout))
        raise RefusedError(
            f"model.reward: {self.name} gave no scores in {attempt + 1} tries and {time.monotonic() - start:.1f} s:"
            f" {answer.problem}\n{hint} {_KEY}.timeout {self.timeout:g} s?",
            answer.status,
        )

    def _post(self, body: bytes) -> _Answer:
        headers = {"Content-Type": "application/json", **self.headers}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_env]}"
        with Deadline(self.timeout) as deadline:
            answer = self._exchange(body, headers)
        if deadline.has_passed:  # what came until then may look complete, and the error is one of a closed socket
            return _Answer(None, f"Timeout: the answer was not complete after {self.timeout:g} s", 0.0)
        return answer

    def _exchange(self, body: bytes, headers: dict[str, str]) -> _Answer:
        """Send one request and read its answer; returns what `_post` does."""
        try:
            with self._session.post(self.url, body, headers=headers, timeout=self.timeout, stream=True) as reply:
                # ---- Redirects, other errors, the answer ----
                status = f"status {reply.status_code} {reply.reason}"
                if 300 <= reply.status_code < 400:
                    target = shorten(reply.headers.get("Location", ""))
                    return _Answer(None, (
                        f"{status}: it redirects to {target}, and redirects are not followed, because prompts and"
                        f" headers would go there; if that is the scorer, set {_KEY}.url to it"
                    ))  # fmt: skip
                if reply.status_code != 200:
                    again = (
                        _retry_after_seconds(reply.headers.get("Retry-After")) if reply.status_code in RETRIED else None
                    )
                    text = self._read_body(reply).decode(errors="replace")
                    return _Answer(None, f"{status}: {shorten(text)}", again, reply.status_code)
                return _Answer(self._read_body(reply))
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            # a connection that fails may succeed the next time
            return _Answer(None, f"{type(error).__name__}: {error}", 0.0)
        except requests.RequestException as error:
            # anything else, such as an invalid header, would fail again
            return _Answer(None, f"{type(error).__name__}: {error}")

    def _read_body(self, reply: requests.Response) -> bytes:
        """Return the body, as far as its size allows; the deadline of the request ends it, too."""
        body = bytearray()
        for chunk in reply.iter_content(2**14):
            body += chunk
            if len(body) > self.max_bytes:
                raise RewardError(
                    f"model.reward: {self.name} answered with more than {_KEY}.max_bytes {self.max_bytes} bytes;"
                    f" expected {self.expected}"
                )
        return bytes(body)


def _retry_after_seconds(text: str | None) -> float:
    """Return what `Retry-After` asks for, as a number or a date; 0 where it says nothing."""
    with suppress(ValueError):  # "120"
        return max(0.0, float(text or 0))
    try:
        return Retry().parse_retry_after(text or "")  # "Fri, 27 Nov 2026 18:00:00 GMT"
    except InvalidHeader:
        return 0.0
