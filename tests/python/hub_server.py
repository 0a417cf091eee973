# SPDX-License-Identifier: Apache-2.0
"""A hub of weights on loopback: files as the authors lay them out, uploads, and the faults of real ones."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api


class Hub(ThreadingHTTPServer):
    """Serves `files` by (repository, name); counts and breaks requests.

    Attributes:
        requests: "METHOD path", with " bytes=..." where a part was asked for.
        cut: how many downloads to break off in their middle.
        damaged: how many downloads to serve with one bit changed.
        status: of every answer about a repository: (status, X-Error-Code).
        large: whether files are named by their sha256, as large ones are.
        etag, named_commit: in the place of the hash and commit of every answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str], bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self.cut = self.damaged = 0
        self.status: tuple[int, str] | None = None
        self.large = True
        self.etag: str | None = None
        self.named_commit: str | None = None
        self.created: list[dict[str, Any]] = []
        self.messages: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self) -> str:
        """Names what is served, as git does."""
        text = "".join(f"{key}{hashlib.sha1(data).hexdigest()}" for key, data in sorted(self.files.items()))
        return hashlib.sha1(text.encode()).hexdigest()

    def handle_error(self, request: Any, address: Any) -> None:
        """A client that went away is no news."""

    def downloads(self) -> list[str]:
        return [line for line in self.requests if line.startswith("GET") and "/resolve/" in line]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        self._file(body=True)

    def _file(self, body: bool) -> None:
        hub, part = self.server, self.headers.get("Range")
        hub.requests.append(f"{self.command} {self.path}" + (f" {part}" if part else ""))
        hub.tokens.append(self.headers.get("authorization"))
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if hub.status is not None:
            return self._answer(hub.status[0], {"X-Error-Code": hub.status[1]})
        if found is None or not any(repo == found[1] for repo, _ in hub.files):
            return self._answer(401, {"X-Error-Code": "RepoNotFound"})
        if found[2] not in ("main", hub.commit()):
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        data = hub.files.get((found[1], found[3]))
        if data is None:
            commit = hub.named_commit or hub.commit()
            return self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        name = hashlib.sha256(data).hexdigest() if hub.large else hashlib.sha1(data).hexdigest()
        name, commit = name if hub.etag is None else hub.etag, hub.named_commit or hub.commit()
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not body:
            return self._answer(200, headers, length=len(data))
        start = int(part.removeprefix("bytes=").split("-")[0]) if part else 0
        if hub.damaged:
            hub.damaged -= 1
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        rest = data[start:]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if hub.cut:
            hub.cut -= 1
            self._answer(206 if start else 200, headers, length=len(rest))
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        return self._answer(206 if start else 200, headers, rest)

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes = b"", length: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    # ---- uploads -------------------------------------------------------------------------------------------

    def _json(self, value: Any) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_PUT(self) -> None:
        data = self._body()
        self.server.requests.append(f"PUT {self.path}")
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self._answer(200, {})

    def do_POST(self) -> None:
        hub, data = self.server, self._body()
        hub.requests.append(f"POST {self.path}")
        hub.tokens.append(self.headers.get("authorization"))
        if hub.status is not None:
            return self._answer(hub.status[0], {"X-Error-Code": hub.status[1]})
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            hub.created.append(asked)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            return self._json({"url": f"{hub.url}/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(data)["files"]
            return self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            return self._json(
                {
                    "transfer": "basic",
                    "objects": [
                        {**one, "actions": {"upload": {"href": f"{hub.url}/store/{one['oid']}"}}}
                        for one in objects
                    ],
                }
            )
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/?]+).*", self.path)
        if found is None:
            return self._answer(404, {})
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                hub.messages.append(value["summary"])
            elif line["key"] == "file":
                hub.files[found[1], value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[found[1], value["path"]] = hub.objects[value["oid"]]
        return self._json(
            {
                "commitUrl": f"{hub.url}/{found[1]}/commit/{hub.commit()}",
                "commitOid": hub.commit(),
                "success": True,
            }
        )


def ask_instead(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub asks this hub in place of huggingface.co, with an empty cache and without waiting.

    Uploads go the way that servers without Xet have.
    """
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: None)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the end of the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
