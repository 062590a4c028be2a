"""A remote reward against a real server: slow, dropping, busy, and wrong in every way."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from helpers.waiting import wait_until

from remax_lightning.errors import RewardError, UserError
from remax_lightning.rewards import HTTPReward
from remax_lightning.rewards.base import checked_scores

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class Scorer:
    """A server whose next answers are set by the test; after those it scores by length."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.seen: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.at_once = self.most_at_once = 0
        self.closed = 0
        self.lock = threading.Lock()
        scorer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # it holds the body back for 40 ms, until the headers are acknowledged

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with scorer.lock:
                    scorer.seen.append((body, dict(self.headers)))
                    scorer.at_once += 1
                    scorer.most_at_once = max(scorer.most_at_once, scorer.at_once)
                    answer = scorer.answers.pop(0) if scorer.answers else by_length
                try:
                    answer(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has given up
                finally:
                    with scorer.lock:
                        scorer.at_once -= 1

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def shutdown_request(self, request: Any) -> None:
                super().shutdown_request(request)
                scorer.closed += 1

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        # The server looks for its end this often, in seconds; by default every test waits half a second for it.
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def reward(self, **options: Any) -> HTTPReward:
        return HTTPReward(self.url, **{"backoff": 0.01, "timeout": 60.0, **options})


def send(
    handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def by_length(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    send(handler, json.dumps({"scores": [len(text) for text in body["responses"]]}).encode())


def saying(text: str, status: int = 200, **headers: str) -> Answer:
    return lambda handler, _: send(handler, text.encode(), status, {k.replace("_", "-"): v for k, v in headers.items()})


def slow(seconds: float) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        by_length(handler, body)

    return answer


def drop(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    handler.close_connection = True
    handler.connection.close()


def break_off(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [1')
    drop(handler, {})


def drip_body(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    """A byte now and then, of a body that would be an answer in the end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "400")
    handler.end_headers()
    for byte in b" " * 393 + b"[1.0  ]":
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def drip_without_length(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    """What has come until the deadline is a valid answer, whose end only the closed connection would show."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"[1, 3, 2, 0, 5, 4, 1]")
    for _ in range(400):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def drip_headers(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.flush_headers()
    for i in range(400):
        handler.wfile.write(f"X-{i}: {i}\r\n".encode())
        handler.wfile.flush()
        time.sleep(0.05)


def trickle(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    """A byte now and then, so that no single read takes long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" " * 2**14)
        time.sleep(0.05)


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    scorer = Scorer()
    yield scorer
    scorer.server.shutdown()
    scorer.server.server_close()


TEXTS = ["a", "bbb", "cc", "", "eeeee", "ffff", "g"]


def score(reward: HTTPReward, texts: list[str] = TEXTS) -> list[float]:
    rows = [{"id": i} for i in range(len(texts))]
    return checked_scores(reward, [f"p{i}" for i in range(len(texts))], texts, rows).reward.tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_scores_come_back_in_order(scorer: Scorer, batch_size: int) -> None:
    scorer.answers = [slow(0.05)]  # the first batch answers last
    assert score(scorer.reward(batch_size=batch_size)) == [len(text) for text in TEXTS]
    assert sorted(text for body, _ in scorer.seen for text in body["responses"]) == sorted(TEXTS)
    assert all(len(body["prompts"]) == len(body["responses"]) <= batch_size for body, _ in scorer.seen)
    assert all("rows" not in body for body, _ in scorer.seen)


def test_a_plain_list_is_an_answer_and_rows_and_headers_are_sent(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORER_TOKEN", "secret")
    scorer.answers = [saying("[1, 2.5]")]
    reward = scorer.reward(send_rows=True, headers={"X-Run": "7"}, token_env="SCORER_TOKEN")
    assert score(reward, ["x", "y"]) == [1.0, 2.5]
    body, headers = scorer.seen[0]
    assert body["rows"] == [{"id": 0}, {"id": 1}]
    assert headers["X-Run"] == "7"
    assert headers["Authorization"] == "Bearer secret"


def test_a_missing_number_of_a_row_is_sent_as_null(scorer: Scorer) -> None:
    reward = scorer.reward(send_rows=True)
    reward.score(["a"], ["b"], [{"level": math.nan, "meta": {"scores": [1.5, math.inf]}}])
    body, _ = scorer.seen[0]
    assert body["rows"] == [{"level": None, "meta": {"scores": [1.5, None]}}]


def test_requests_run_at_once_up_to_the_limit(scorer: Scorer) -> None:
    three_arrived = threading.Barrier(3)

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        three_arrived.wait(timeout=30)
        slow(0.05)(handler, body)

    scorer.answers = [answer] * 6
    score(HTTPReward(scorer.url, batch_size=1, concurrency=3, timeout=60.0))
    assert scorer.most_at_once == 3


@pytest.mark.parametrize(
    "failing", [drop, break_off, saying("busy", 503), saying("slow down", 429, Retry_After="0.01")]
)
def test_what_may_pass_is_asked_again(scorer: Scorer, failing: Answer) -> None:
    scorer.answers = [failing, failing]
    assert score(scorer.reward()) == [len(text) for text in TEXTS]
    assert len(scorer.seen) == 3


@pytest.mark.slow
def test_an_answer_that_comes_too_late_is_asked_for_again(scorer: Scorer) -> None:
    scorer.answers = [slow(1.5), slow(1.5)]
    assert score(scorer.reward(timeout=0.5, retries=9)) == [len(text) for text in TEXTS]
    assert len(scorer.seen) >= 3  # more on a busy machine, which is late by itself


@pytest.mark.slow(0.3)
def test_the_server_says_how_long_to_wait(scorer: Scorer) -> None:
    scorer.answers = [saying("slow down", 429, Retry_After="0.4")]
    start = time.monotonic()
    score(scorer.reward())
    assert time.monotonic() - start > 0.4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "said", "timeout"),
    [
        (drop, "ConnectionError", 60.0),
        (saying("out of memory", 500), "status 500 .*: 'out of memory'", 60.0),
        (slow(1.0), "Timeout", 0.3),
    ],
)
def test_it_gives_up_after_the_retries_and_says_why(scorer: Scorer, failing: Answer, said: str, timeout: float) -> None:
    scorer.answers = [failing] * 10
    start = time.monotonic()
    with pytest.raises(
        RewardError, match=rf"(?s)HTTPReward\({scorer.url}\) gave no scores in 3 tries.*{said}.*timeout"
    ):
        score(scorer.reward(retries=2, timeout=timeout))
    assert time.monotonic() - start < 30  # three tries of 0.3 s, on a machine that may be busy
    assert len(scorer.seen) == 3


def test_nobody_there() -> None:
    with pytest.raises(RewardError, match=r"gave no scores in 2 tries.*ConnectionError"):
        score(HTTPReward("http://127.0.0.1:9/score", retries=1, backoff=0.01))


@pytest.mark.slow(0.3)
def test_an_answer_that_never_ends_is_given_up_in_time(scorer: Scorer) -> None:
    scorer.answers = [trickle]
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"the answer was not complete after 0\.5 s"):
        score(scorer.reward(retries=0, timeout=0.5))
    assert time.monotonic() - start < 30


@pytest.mark.slow
@pytest.mark.parametrize("drip", [drip_body, drip_without_length, drip_headers])
def test_the_timeout_holds_for_an_answer_that_drips(drip: Answer, scorer: Scorer) -> None:
    """No single read takes long, and the whole would take 20 s."""
    scorer.answers = [drip, drip]
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"in 2 tries.*Timeout: the answer was not complete after 0\.3 s"):
        score(scorer.reward(retries=1, timeout=0.3))
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_a_drip_is_asked_again(scorer: Scorer) -> None:
    scorer.answers = [drip_headers, drip_body]
    assert score(scorer.reward(timeout=0.5, retries=9)) == [len(text) for text in TEXTS]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_its_target_named(status: int, scorer: Scorer) -> None:
    """A 307 would take prompts, headers and all to another host."""
    other = Scorer()
    try:
        scorer.answers = [saying("", status, Location=other.url)]
        reward = scorer.reward(headers={"X-Api-Key": "secret"})
        with pytest.raises(RewardError, match=rf"in 1 tries.*status {status} .*redirects to '{other.url}'.*not follow"):
            score(reward)
    finally:
        other.server.shutdown()
        other.server.server_close()
    assert other.seen == []
    assert len(scorer.seen) == 1


def test_the_body_of_a_redirect_is_not_read(scorer: Scorer) -> None:
    scorer.answers = [lambda handler, _: send(handler, b"x" * 2**26, 302, {"Location": "http://elsewhere"})]
    with pytest.raises(RewardError, match="redirects to 'http://elsewhere'"):
        score(scorer.reward(max_bytes=100))


def test_one_connection_serves_many_batches(scorer: Scorer) -> None:
    clients = []

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        clients.append(handler.client_address)
        by_length(handler, body)

    scorer.answers = [answer] * 14
    reward = scorer.reward(batch_size=1, concurrency=1)
    assert score(reward) == score(reward) == [len(text) for text in TEXTS]
    assert len(clients) == 14
    assert len(set(clients)) == 1


def test_a_connection_that_the_server_closed_in_between_is_made_anew(scorer: Scorer) -> None:
    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        by_length(handler, body)
        handler.close_connection = True

    scorer.answers = [answer]
    reward = scorer.reward(retries=0)
    score(reward)
    assert wait_until(lambda: scorer.closed)
    assert score(reward) == [len(text) for text in TEXTS]


@pytest.mark.slow
def test_a_date_says_how_long_to_wait(scorer: Scorer) -> None:
    start = time.monotonic()
    scorer.answers = [saying("later", 503, Retry_After=formatdate(time.time() + 2, usegmt=True))]
    score(scorer.reward())
    assert time.monotonic() - start > 0.9


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (saying("<html>It works!</html>"), "answered with no JSON: '<html>It works!</html>'"),
        (saying("[1, 2]"), "answered with 2 scores; expected 7 finite numbers"),
        (saying('{"reward": 1}'), "answered with '{\"reward\": 1}'; expected 7"),
        (saying("[1, 2, 3, NaN, 5, 6, 7]"), r"answered with nan at index 3.*\n.*prompt: 'p3'\n.*response: ''"),
        (saying('[1, 2, 3, 4, "5", 6, 7]'), "answered with '5' at index 4"),
        (saying("[1, 2, 3, 4, null, 6, 7]"), "answered with None at index 4"),
        (saying("[true, 2, 3, 4, 5, 6, 7]"), "answered with True at index 0"),
        (saying("[1, 2, 3, 4, 5, 6, 1e999]"), "answered with inf at index 6"),
        (saying(f"[1, 2, 3, 4, 5, 6, 1{'0' * 400}]"), "answered with 10+ at index 6"),
        (saying("[" * 3000), "answered with no JSON"),
        (saying("no such path", 404), "in 1 tries.*status 404"),
        (saying(" " * 5000), r"more than model\.reward\.init_args\.max_bytes 4096 bytes"),
    ],
)
def test_a_wrong_answer_is_refused_at_once(scorer: Scorer, answer: Answer, said: str) -> None:
    scorer.answers = [answer]
    with pytest.raises(RewardError, match=f"(?s){said}"):
        score(scorer.reward(max_bytes=4096))
    assert len(scorer.seen) == 1


def test_one_failing_batch_ends_the_others(scorer: Scorer) -> None:
    scorer.answers = [saying("nothing")]
    with pytest.raises(RewardError, match="no JSON"):
        score(scorer.reward(batch_size=1, concurrency=1), ["x"] * 50)
    assert len(scorer.seen) < 50


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("url", "localhost:8000"),
        ("url", "file:///etc/passwd"),
        ("batch_size", 0),
        ("concurrency", 0),
        ("timeout", 0.0),
        ("timeout", float("inf")),
        ("retries", -1),
        ("backoff", -1.0),
        ("max_bytes", 0),
        ("token_env", "NO_SUCH_VARIABLE"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"model\.reward\.init_args\.{name}"):
        HTTPReward(**{"url": "http://localhost", name: value})
