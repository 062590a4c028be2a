"""A reward behind a URL: prompts and responses are posted as JSON, scores come back."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from remax_lightning.errors import RewardError, UserError
from remax_lightning.rewards.base import Reward, shorten

_KEY = "model.reward.init_args"
RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Statuses of a server that may answer the same request later."""


class HTTPReward(Reward):
    """Scores responses by a remote scorer.

    It is posted `{"prompts": [...], "responses": [...]}`, with `"rows": [...]` where they are asked for, each of `M`
    entries, and answers with a list of `M` finite numbers, alone or as `{"scores": [...]}`. Each rank asks for itself.

    Args:
        url: where the scorer listens, http or https.
        batch_size: responses per request.
        concurrency: requests under way at once.
        timeout: seconds that one request may take in all, from connecting to the last byte.
        retries: how often a request is repeated after a failed connection, a timeout or a busy server (status 408, 425,
            429 or 5xx). An answer that is wrong is not asked for again.
        backoff: seconds before the first repetition, doubled before each further one; a server's `Retry-After` counts
            where it is longer, up to `timeout`.
        max_bytes: of one answer; a longer one is refused before it is read.
        headers: sent with every request. They are saved with the run's configuration: a secret goes into `token_env`.
        token_env: environment variable with a bearer token for the `Authorization` header.
        send_rows: whether the raw rows of the data set are sent too.

    Raises:
        UserError: if the URL is none, a number is out of its range, or the environment variable is not set.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 64,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_bytes: int = 2**24,
        headers: dict[str, str] | None = None,
        token_env: str | None = None,
        send_rows: bool = False,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise UserError(f"{_KEY}.url must begin with http:// or https:// and a host, got {url!r}")
        checks = (
            ("batch_size", batch_size, batch_size >= 1, "at least 1"),
            ("concurrency", concurrency, concurrency >= 1, "at least 1"),
            ("timeout", timeout, 0 < timeout < math.inf, "above 0 and finite (seconds)"),
            ("retries", retries, retries >= 0, "0 or more"),
            ("backoff", backoff, 0 <= backoff < math.inf, "0 or more and finite (seconds)"),
            ("max_bytes", max_bytes, max_bytes >= 2, "at least 2"),
        )
        for name, value, holds, expected in checks:
            if not holds:
                raise UserError(f"{_KEY}.{name} must be {expected}, got {value}")
        if token_env is not None and not os.environ.get(token_env):
            raise UserError(f"{_KEY}.token_env: the environment variable {token_env} is not set; export it")
        self.url, self.batch_size, self.concurrency, self.timeout = url, batch_size, concurrency, timeout
        self.retries, self.backoff, self.max_bytes = retries, backoff, max_bytes
        self.headers, self.token_env, self.send_rows = dict(headers or {}), token_env, send_rows

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
        columns: dict[str, Sequence[Any]] = {"prompts": prompts, "responses": responses}
        if self.send_rows:
            columns["rows"] = rows
        starts = range(0, len(responses), self.batch_size)
        batches = [{name: list(values[i : i + self.batch_size]) for name, values in columns.items()} for i in starts]
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                return [score for scores in pool.map(self._scores, batches) for score in scores]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _scores(self, batch: dict[str, list[Any]]) -> list[float]:
        """Return the scores of one batch, asking again as long as that may help."""
        try:
            body = json.dumps(batch, default=str).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"model.reward: {self!r} cannot send the rows as JSON: {error}") from error
        start = time.monotonic()
        for attempt in range(self.retries + 1):
            answer, problem, wait = self._post(body)
            if answer is not None:
                return self._checked(answer, batch)
            if wait is None or attempt == self.retries:
                break
            time.sleep(min(max(self.backoff * 2**attempt, wait), self.timeout))
        raise RewardError(
            f"model.reward: {self!r} gave no scores in {attempt + 1} tries and {time.monotonic() - start:.1f} s:"
            f" {problem}\nIs the scorer running there, and quick enough for {_KEY}.batch_size {self.batch_size} within"
            f" {_KEY}.timeout {self.timeout:g} s?"
        )

    def _post(self, body: bytes) -> tuple[bytes | None, str, float | None]:
        """Return the answer, or what went wrong and how long the server wants us to wait; None if asking is no use."""
        import requests

        headers = {"Content-Type": "application/json", **self.headers}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_env]}"
        deadline = time.monotonic() + self.timeout
        try:
            with requests.post(self.url, body, headers=headers, timeout=self.timeout, stream=True) as reply:
                if reply.status_code != 200:
                    again = (
                        _retry_after_seconds(reply.headers.get("Retry-After")) if reply.status_code in RETRIED else None
                    )
                    text = self._read_body(reply, deadline).decode(errors="replace")
                    return None, f"status {reply.status_code} {reply.reason}: {shorten(text)}", again
                return self._read_body(reply, deadline), "", None
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            return None, f"{type(error).__name__}: {error}", 0.0
        except requests.RequestException as error:
            return None, f"{type(error).__name__}: {error}", None

    def _read_body(self, reply: Any, deadline: float) -> bytes:
        """Return the body, as far as time and size allow."""
        import requests

        body = bytearray()
        for chunk in reply.iter_content(2**14):
            body += chunk
            if len(body) > self.max_bytes:
                raise RewardError(
                    f"model.reward: {self!r} answered with more than {_KEY}.max_bytes {self.max_bytes} bytes; expected"
                    " a list of numbers"
                )
            if time.monotonic() > deadline:
                raise requests.Timeout(f"the answer was not complete after {self.timeout:g} s")
        return bytes(body)

    def _checked(self, answer: bytes, batch: dict[str, list[Any]]) -> list[float]:
        count = len(batch["responses"])
        try:
            scores = json.loads(answer)
        except ValueError:
            raise self._error(f"no JSON: {shorten(answer.decode(errors='replace'))}", count) from None
        if isinstance(scores, dict) and "scores" in scores:
            scores = scores["scores"]
        if not isinstance(scores, list):
            raise self._error(f"{shorten(json.dumps(scores))}", count)
        if len(scores) != count:
            raise self._error(f"{len(scores)} scores", count)
        for index, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
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


def _retry_after_seconds(text: str | None) -> float:
    """Return what `Retry-After` asks for; 0 where it says nothing, or a date."""
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
