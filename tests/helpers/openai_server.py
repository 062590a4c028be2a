"""A small server with the chat completions of the OpenAI API, whose answers a test writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class OpenAIServer:
    """Answers each question with what a function makes of its text; use it as a context manager.

    Args:
        answer: returns the judge's text.
        statuses: of the next requests, in place of answers.
        schemas: whether a `response_format` is taken; otherwise it is refused with status 400.
    """

    def __init__(
        self,
        answer: Callable[[str], str],
        statuses: tuple[int, ...] = (),
        *,
        schemas: bool = True,
    ) -> None:
        self.questions: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        waiting, lock, server = list(statuses), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # it holds the body back for 40 ms, until the headers are acknowledged

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = request["messages"][-1]["content"]
                with lock:
                    server.requests.append(request)
                    server.headers.append({"path": self.path, **dict(self.headers)})
                    status = waiting.pop(0) if waiting else 200 if schemas or "response_format" not in request else 400
                    server.questions += [question] if status == 200 else []
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                text = answer(question) if status == 200 else "not now"
                body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
                with lock:
                    server.at_once -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> OpenAIServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
