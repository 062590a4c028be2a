"""A small Hugging Face hub on this machine, which the real client of `huggingface_hub` talks to over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Hub:
    """Takes repositories, files and commits as the hub does, without Xet; use it as a context manager.

    Args:
        token: the one that may write.
    """

    def __init__(self, token: str = "hf_right") -> None:
        self.token = token
        self.repositories: dict[str, dict[str, Any]] = {}
        """What each repository was created with."""
        self.files: dict[str, dict[str, bytes]] = {}
        """The content of committed files by their names, by repository."""
        self.commits: list[tuple[str, str]] = []
        """Repository and message of each commit."""
        self._objects: dict[str, bytes] = {}  # large files by their SHA-256
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return content

            def answer(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_PUT(self) -> None:
                content, name = self.body(), self.path.rpartition("/")[2]
                assert hashlib.sha256(content).hexdigest() == name
                hub._objects[name] = content
                self.answer(200, {})

            def do_POST(self) -> None:
                body = self.body()
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self.answer(401, {"error": "Invalid username or password."})
                else:
                    self.answer(*hub._post(self.path.partition("?")[0], body))

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _post(self, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the answer of a request."""
        if path == "/api/repos/create":
            options = json.loads(body)
            name = f"{options.pop('organization')}/{options.pop('name')}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repositories[name], self.files[name] = options, {}
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": "1"}
        if path == "/api/validate-yaml":
            is_card = json.loads(body)["content"].startswith("---\n")
            return (200, {"errors": [], "warnings": []}) if is_card else (400, {"errors": [{"message": "no metadata"}]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            if match[1] not in self.files:
                return 404, {"error": "Repository not found"}
            return self._preupload(body) if match[2] == "preupload" else self._commit(match[1], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.url}/objects/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        return 404, {"error": f"there is no {path}"}

    def _preupload(self, body: bytes) -> tuple[int, Any]:
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
        return 200, {
            "files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
        }

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for entry in map(json.loads, body.decode().splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                self.commits.append((name, value["summary"]))
            elif entry["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            else:
                assert entry["key"] == "lfsFile"
                self.files[name][value["path"]] = self._objects[value["oid"]]
        oid = "0" * 40
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, token: str = "hf_right") -> None:
    """Let `huggingface_hub` talk to this address, with this token, and upload without Xet."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", token)
