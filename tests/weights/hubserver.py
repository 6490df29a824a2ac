"""A small Hugging Face Hub on this machine: one repository, its files, and the troubles it is told to make."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server serves and what it is asked.

    Attributes:
        repository: `owner/name`.
        files: content by path.
        large: paths that are kept in LFS, so that SHA-256 is stated for them.
        gated: whether a token is needed.
        tokens: those that have access.
        cut: by path, how many bytes of the file go out before the connection is closed, for one request each.
        wrong: paths whose content differs from what is announced.
        ignores_ranges: always send the whole file.
        refuse: answer every download with this status.
        asked: (path, first byte) of every download.
    """

    repository: str
    files: dict[str, bytes]
    large: set[str]
    gated: bool = False
    tokens: tuple[str, ...] = ("good",)
    cut: dict[str, list[int]] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    ignores_ranges: bool = False
    refuse: int = 0
    commit: str = COMMIT
    asked: list[tuple[str, int]] = field(default_factory=list)
    url: str = ""

    def digest(self, path: str) -> str:
        content = self.files[path]
        if path in self.large:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def about(self) -> dict[str, Any]:
        """The answer of /api/models/REPOSITORY/revision/main?blobs=True."""
        siblings: list[dict[str, Any]] = []
        for path, content in self.files.items():
            sibling: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": self.digest(path)}
            if path in self.large:
                sibling["blobId"] = "f" * 40
                sibling["lfs"] = {"sha256": self.digest(path), "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        return {"_id": "1", "id": self.repository, "sha": self.commit, "private": False, "siblings": siblings}


class Handler(BaseHTTPRequestHandler):
    """Requests as huggingface_hub makes them."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def say(self, status: int, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            if not path.startswith(f"/api/models/{self.hub.repository}/revision/"):
                return self.say(404, "RepoNotFound")
            body = json.dumps(self.hub.about()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return None
        match = re.fullmatch(rf"/{self.hub.repository}/resolve/(main|{self.hub.commit})/(.+)", path)
        if match is None:
            return self.say(404, "RevisionNotFound")
        return self.send_file(match[2])

    def send_file(self, name: str) -> None:
        hub = self.hub
        if self.command == "GET" and hub.refuse:
            return self.say(hub.refuse)
        if hub.gated and self.headers.get("Authorization", "").removeprefix("Bearer ") not in hub.tokens:
            return self.say(403 if "Authorization" in self.headers else 401, "GatedRepo")
        if name not in hub.files:
            return self.say(404, "EntryNotFound")
        content, digest = hub.files[name], hub.digest(name)
        if name in hub.wrong:
            content = bytes(byte ^ 1 for byte in content)
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(first[1]) if first and not hub.ignores_ranges else 0
        if self.command == "GET":
            hub.asked.append((name, start))
        if start >= len(content) > 0:
            return self.say(416)
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", hub.commit)
        if name in hub.large:
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(content)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if hub.cut.get(name):
            self.wfile.write(content[start : start + hub.cut[name].pop(0)])
            self.close_connection = True
            return None
        self.wfile.write(content[start:])
        return None


def serve(hub: Hub) -> ThreadingHTTPServer:
    """Start serving on a free port; the caller shuts it down."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server
