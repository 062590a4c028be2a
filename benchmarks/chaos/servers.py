"""Reward servers that are slow, broken or hostile, written on bare sockets, and a short run against each of them."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.chaos.runs import Fixtures, configuration, write
from benchmarks.chaos.warm import CLEAR, CODE, RIGHT, WRONG, Outcome, Trial, command, judge

Answer = Callable[[socket.socket, int], None]
"""Answers a request for so many scores; the connection is closed afterwards."""

TIMEOUT = 1.5
"""Seconds of `HTTPReward.timeout`; each server that never ends costs two tries of it."""


# ---- Answers ----


def head(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """Return a whole answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def scores(count: int) -> bytes:
    """Return a right body."""
    return json.dumps([i / 7 for i in range(count)]).encode()


def says(body: bytes | str, status: str = "200 OK", *headers: str) -> Answer:
    """Answer with a fixed body."""
    content = body.encode() if isinstance(body, str) else body
    return lambda connection, _: connection.sendall(head(content, status, *headers))


def made(make: Callable[[list[float]], Any]) -> Answer:
    """Answer with JSON made of right scores."""
    return lambda connection, count: connection.sendall(head(json.dumps(make(json.loads(scores(count)))).encode()))


def raw(*parts: bytes, then: str = "close") -> Answer:
    """Send bytes as they are, and `close`, `wait` or `reset`."""

    def answer(connection: socket.socket, _: int) -> None:
        for part in parts:
            connection.sendall(part)
        if then == "wait":
            time.sleep(30)
        if then == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def repeating(start: bytes, part: bytes, pause: float = 0.0) -> Answer:
    """Send one part over and over."""

    def answer(connection: socket.socket, _: int) -> None:
        connection.sendall(start)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            connection.sendall(part)
            time.sleep(pause)

    return answer


def good(connection: socket.socket, count: int) -> None:
    """Answer rightly."""
    connection.sendall(head(scores(count)))


def slow(connection: socket.socket, count: int) -> None:
    """Answer rightly, in time."""
    time.sleep(TIMEOUT / 2)
    good(connection, count)


def chunked(connection: socket.socket, count: int) -> None:
    """Answer rightly, in chunks."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for byte in scores(count):
        connection.sendall(b"1\r\n" + bytes([byte]) + b"\r\n")
    connection.sendall(b"0\r\n\r\n")


def zipped(connection: socket.socket, count: int) -> None:
    """Answer rightly, compressed."""
    connection.sendall(head(gzip.compress(scores(count)), "200 OK", "Content-Encoding: gzip"))


OK = b"HTTP/1.1 200 OK\r\n"
BOMB = gzip.compress(b" " * 2**26)
DEEP = b"[" * 100_000 + b"]" * 100_000

FRIENDLY: dict[str, list[Answer]] = {
    "right": [good],
    "scores in a dictionary": [made(lambda values: {"scores": values})],
    "whole numbers": [made(lambda values: [int(value) for value in values])],
    "slow, in time": [slow],
    "chunked": [chunked],
    "compressed": [zipped],
    "HTTP 1.0": [lambda connection, count: connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + scores(count))],
    "100 Continue first": [
        lambda connection, count: connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" + head(scores(count)))
    ],
    "503 once": [says("busy", "503 Service Unavailable"), good],
    "429 once": [says("slow down", "429 Too Many Requests", "Retry-After: 0"), good],
    "a reset once": [raw(then="reset"), good],
    "an answer broken off once": [raw(OK + b"Content-Length: 500\r\n\r\n[1.0,"), good],
    "no answer once": [raw(then="wait"), good],
}
"""Answers to the requests of a run in turn, the last one again and again: the run must go right."""

HOSTILE: dict[str, Answer] = {
    "a body that drips": repeating(OK + b"Content-Length: 100000\r\n\r\n", b" ", 0.05),
    "headers that drip": repeating(OK, b"X-Header: 1\r\n", 0.05),
    "a status line that drips": repeating(b"", b"H", 0.05),
    "headers without end": repeating(OK, b"X-Header: 1\r\n"),
    "one header without end": repeating(OK + b"X-Header: ", b"x" * 1000),
    "a body without end": repeating(OK + b"\r\n", b" " * 4096),
    "chunks without end": repeating(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b" " * 4096 + b"\r\n"),
    "empty chunks of one byte": repeating(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.02),
    "100 Continue without end": repeating(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a huge length": raw(OK + b"Content-Length: 99999999999999999999\r\n\r\n[1]", then="wait"),
    "a huge body": repeating(OK + b"Content-Length: 10000000000\r\n\r\n", b" " * 65536),
    "a gzip bomb": says(BOMB, "200 OK", "Content-Encoding: gzip"),
    "gzip that is none": says(b"[1.0]" * 40, "200 OK", "Content-Encoding: gzip"),
    "an unknown encoding": says(b"\x8b\x03", "200 OK", "Content-Encoding: br, zstd, x"),
    "no answer": raw(then="wait"),
    "a close at once": raw(),
    "a reset": raw(then="reset"),
    "a reset in the body": raw(OK + b"Content-Length: 500\r\n\r\n[1.0,", then="reset"),
    "half an answer": raw(OK + b"Content-Length: 500\r\n\r\n[1.0,"),
    "no HTTP": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "zeros": raw(bytes(10_000)),
    "a status without a number": raw(b"HTTP/1.1 abc OK\r\n\r\n[]"),
    "a status of six digits": raw(b"HTTP/1.1 200200 OK\r\n\r\n[]"),
    "a negative length": raw(OK + b"Content-Length: -5\r\n\r\n[1.0]"),
    "two lengths": raw(OK + b"Content-Length: 5\r\nContent-Length: 900\r\n\r\n[1.0]"),
    "a wrong chunk size": raw(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n[1.0]\r\n0\r\n\r\n"),
    "a negative chunk size": raw(OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n[1.0]\r\n0\r\n\r\n"),
    "a thousand headers": raw(OK + b"".join(b"X-%d: 1\r\n" % i for i in range(1000)) + b"\r\n[1]"),
    "a header of a megabyte": raw(OK + b"X: " + b"x" * 2**20 + b"\r\n\r\n[1]"),
    "cookies": raw(OK + b"Set-Cookie: a=b; Domain=.com\r\n" * 50 + b"Content-Length: 2\r\n\r\n[]"),
    "101 Switching Protocols": says("", "101 Switching Protocols", "Upgrade: websocket"),
    "204 No Content": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "206 Partial Content": says("[1.0", "206 Partial Content"),
    "304 Not Modified": raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    "401": says("who are you", "401 Unauthorized", "WWW-Authenticate: Basic"),
    "403": says("no", "403 Forbidden"),
    "404": says("<html>not here</html>", "404 Not Found"),
    "413": says("too large", "413 Payload Too Large"),
    "407": says("proxy", "407 Proxy Authentication Required", "Proxy-Authenticate: Basic"),
    "500 storm": says("Traceback (in the scorer): boom", "500 Internal Server Error"),
    "503 storm": says("busy", "503 Service Unavailable"),
    "429 storm": says("slow down", "429 Too Many Requests", "Retry-After: 0"),
    "Retry-After of years": says("", "429 Too Many Requests", "Retry-After: 999999999"),
    "Retry-After that is no number": says("", "503 Service Unavailable", "Retry-After: soon"),
    "Retry-After of nan": says("", "503 Service Unavailable", "Retry-After: nan"),
    "Retry-After below zero": says("", "503 Service Unavailable", "Retry-After: -5"),
    "Retry-After of inf": says("", "503 Service Unavailable", "Retry-After: inf"),
    "a date beyond dates": says("", "503 Service Unavailable", "Retry-After: Fri, 31 Dec 99999 23:59:59 GMT"),
    "an empty body": says(""),
    "HTML": says("<html><body>welcome</body></html>", "200 OK", "Content-Type: text/html"),
    "text": says("1.0 2.0 3.0"),
    "null": says("null"),
    "a number": says("1.0"),
    "a text": says('"scores"'),
    "true": says("true"),
    "an object without scores": says('{"rewards": [1, 2]}'),
    "scores that are an object": says('{"scores": {"0": 1.0}}'),
    "an error object": says('{"error": "out of memory", "scores": null}'),
    "too few": made(lambda values: values[:-1]),
    "too many": made(lambda values: [*values, 1.0]),
    "none": says("[]"),
    "NaN": made(lambda values: [float("nan"), *values[1:]]),
    "infinity": made(lambda values: [*values[:-1], float("inf")]),
    "more than a float": lambda connection, count: connection.sendall(
        head(b"[" + b",".join([b"1e999"] * count) + b"]")
    ),
    "an integer of 10,000 digits": lambda connection, count: connection.sendall(
        head(b"[" + b",".join([b"9" * 10_000] * count) + b"]")
    ),
    "an integer of 400 digits": lambda connection, count: connection.sendall(
        head(b"[" + b",".join([b"9" * 400] * count) + b"]")
    ),
    "numbers as text": made(lambda values: [str(value) for value in values]),
    "truth values": made(lambda values: [True for _ in values]),
    "null among scores": made(lambda values: [None, *values[1:]]),
    "lists of scores": made(lambda values: [[value] for value in values]),
    "deeply nested": says(DEEP),
    "JSON that is cut": says('{"scores": [1.0, 2.0'),
    "two JSON values": says("[1.0] [2.0]"),
    "no UTF-8": says(b"\xff\xfe[1.0]"),
    "half a surrogate": says('["\\ud800"]'),
    "a null byte": says(b"[1.0\x00]"),
    "terminal escapes": says("\x1b[2J\x1b]0;owned\x07<oops>", "500 \x1b[31mred"),
    "redirect 301": says("", "301 Moved Permanently", "Location: {elsewhere}"),
    "redirect 302": says("", "302 Found", "Location: {elsewhere}"),
    "redirect 307": says("", "307 Temporary Redirect", "Location: {elsewhere}"),
    "redirect 308": says("", "308 Permanent Redirect", "Location: {elsewhere}"),
    "redirect with a body without end": repeating(b"HTTP/1.1 302 Found\r\nLocation: {elsewhere}\r\n\r\n", b" " * 4096),
    "redirect without a place": says("", "302 Found"),
    "redirect to a file": says("", "302 Found", "Location: file:///etc/passwd"),
}
"""Answers that a run must end at clearly."""

TRANSPORT = ("TLS to a plain server", "plain to a TLS server", "a certificate of nobody", "TLS that never answers",
             "TLS that is reset", "nobody listens", "a host that does not exist")  # fmt: skip
"""What goes wrong before a request."""


# ---- The servers ----


class Server:
    """Listens on a port of this machine and answers in threads of its own process.

    Args:
        folder: gets a file `elsewhere` if something is sent to where redirects point.
        answers: to requests in turn, the last one again and again.
        tls: a certificate and key in one file, for TLS.
        handshakes: whether connections are greeted at all; `reset` resets them.
    """

    def __init__(self, folder: Path, answers: list[Answer], tls: Path | None = None, handshakes: str = "yes") -> None:
        self.folder, self.answers, self.count = folder, answers, 0
        self.handshakes = handshakes
        self.context = None
        if tls is not None:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(tls)
        self.socket, self.other = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
        self.port, self.elsewhere = (item.getsockname()[1] for item in (self.socket, self.other))
        self.pid = os.fork()
        if self.pid == 0:
            threading.Thread(target=self._watch_elsewhere, daemon=True).start()
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """End the process."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        self.socket.close()
        self.other.close()

    def _watch_elsewhere(self) -> None:
        while True:
            connection, _ = self.other.accept()
            (self.folder / "elsewhere").write_bytes(connection.recv(10_000))
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection:
            if self.handshakes == "never":
                time.sleep(30)
            if self.handshakes == "reset":
                raw(then="reset")(connection, 0)
                return
            if self.context is not None:
                connection = self.context.wrap_socket(connection, server_side=True)
            count = self._read_request(connection)
            answer = self.answers[min(self.count, len(self.answers) - 1)]
            self.count += 1
            answer(_Filling(connection, f"http://127.0.0.1:{self.elsewhere}/"), count)  # type: ignore[arg-type]

    def _read_request(self, connection: socket.socket) -> int:
        """Read a request, and return how many scores it asks for."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536) or b"\r\n\r\n"
        header, _, body = data.partition(b"\r\n\r\n")
        lengths = [line for line in header.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        length = int(lengths[0].split(b":")[1]) if lengths else 0
        while len(body) < length and (part := connection.recv(65536)):
            body += part
        return len(json.loads(body)["responses"])


class _Filling:
    """A connection that writes the address of the other server where an answer has a mark."""

    def __init__(self, connection: socket.socket, elsewhere: str) -> None:
        self.connection, self.elsewhere = connection, elsewhere.encode()

    def sendall(self, data: bytes) -> None:
        """Send the data with the mark filled."""
        self.connection.sendall(data.replace(b"{elsewhere}", self.elsewhere))

    def setsockopt(self, *arguments: Any) -> None:
        """Pass options on."""
        self.connection.setsockopt(*arguments)


def make_certificate(folder: Path) -> Path | None:
    """Return a self-signed certificate with its key in one file; None if there is no openssl."""
    path = folder / "certificate.pem"
    arguments = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    try:
        subprocess.run(["openssl", *arguments, "-keyout", path, "-out", folder / "public.pem"], check=True,
                       capture_output=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    path.write_bytes(path.read_bytes() + (folder / "public.pem").read_bytes())
    return path


# ---- Trials ----


def trials(fixtures: Fixtures, seed: int, quick: bool = False) -> Iterator[Trial]:
    """Yield a trial for every server."""
    names = [*FRIENDLY, *HOSTILE, *TRANSPORT]
    for index, name in enumerate(names[5::9] if quick else names):
        yield Trial("server", index, seed, partial(ask, fixtures, name))


def ask(fixtures: Fixtures, name: str, folder: Path, _: random.Random) -> Outcome:
    """Begin a run whose reward is this server."""
    tls, handshakes, url = None, "yes", "http://127.0.0.1:{port}/score"
    if "TLS" in name or "certificate" in name:
        url = url.replace("http", "https") if name != "plain to a TLS server" else url
        handshakes = {"TLS that never answers": "never", "TLS that is reset": "reset"}.get(name, "yes")
        if name in ("plain to a TLS server", "a certificate of nobody"):
            tls = make_certificate(folder)
            if tls is None:
                return Outcome("skipped", "there is no openssl", name)
    answers = FRIENDLY.get(name) or [HOSTILE.get(name, good)]
    server = Server(folder, answers, tls, handshakes)
    try:
        url = url.format(port=server.port)
        if name == "nobody listens":
            server.close()
        if name == "a host that does not exist":
            url = "http://nowhere.invalid/score"
        return _ask(fixtures, name, url, folder)._replace(case=name)
    finally:
        if name != "nobody listens":
            server.close()


def _ask(fixtures: Fixtures, name: str, url: str, folder: Path) -> Outcome:
    config = configuration(fixtures, folder)
    options = {"url": url, "timeout": TIMEOUT, "retries": 1, "backoff": 0.01, "batch_size": 4, "concurrency": 2}
    config["model"]["reward"] = {"class_path": "HTTPReward", "init_args": options}
    config["trainer"]["max_steps"] = 1
    config["evaluation"]["at_start"] = False
    config["data"]["val_size"] = 0
    ended = command(folder, "fit", "--config", write(folder / "run.yaml", config), deadline=60)
    outcome = judge(ended)
    if "Traceback (in the scorer)" in ended.text and outcome.outcome == "traceback":
        outcome = judge(ended._replace(text=ended.text.replace("Traceback (in the scorer)", "")))
    if (folder / "elsewhere").exists():
        return Outcome(CODE, "the prompts went to where a redirect points")
    if "\x1b" in outcome.detail:
        return Outcome(WRONG, f"a server's escapes reach the terminal: {outcome.detail!r}")
    if name in FRIENDLY and outcome.outcome == CLEAR:
        return Outcome(WRONG, f"a good server was refused: {outcome.detail}")
    if name not in FRIENDLY and outcome.outcome == RIGHT:
        return Outcome(WRONG, "it trained on what the server said")
    return outcome
