"""Servers on this machine, and names that lead to them: what a server is sent to, for good and for bad."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class Asked(BaseHTTPRequestHandler):
    """Answers with what `server.answer` writes, and keeps what it was asked."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.command, self.path, headers, body))  # type: ignore[attr-defined]
        self.server.answer(self)  # type: ignore[attr-defined]

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


class Neighbour(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Callable[[Asked], None], host: str = "127.0.0.1") -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), Asked)
        self.answer, self.seen = answer, list[tuple[str, str, dict[str, str], bytes]]()
        self.names = list[str | None]()  # that clients asked a certificate for

    def handle_error(self, *_: Any) -> None:
        pass  # clients hang up on purpose

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def url(self, host: str = "127.0.0.1", path: str = "/", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


@contextmanager
def neighbour(
    answer: Callable[[Asked], None], tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> Generator[Neighbour]:
    server = Neighbour(answer, host)
    if tls is not None:
        tls.sni_callback = lambda _, name, __: server.names.append(name)
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def says(status: int = 200, body: bytes = b"", **headers: str) -> Callable[[Asked], None]:
    """An answer; underscores in names of headers are dashes."""

    def answer(asked: Asked) -> None:
        asked.send_response(status)
        for name, value in {"content_length": str(len(body)), **headers}.items():
            asked.send_header(name.replace("_", "-"), value)
        asked.end_headers()
        asked.wfile.write(body)

    return answer


class Names:
    """A resolver: a name leads to its addresses, or to one list of them after the other; it keeps what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known, self.asked = dict[str, list[Any]](), list[str]()
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        self.asked.append(host)
        places = self.known.get(host.rstrip("."))
        if not places:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        if isinstance(places[0], list):
            places = places.pop(0) if len(places) > 1 else places[0]
        kinds = [
            (socket.AF_INET6, (one, port, 0, 0)) if ":" in one else (socket.AF_INET, (one, port)) for one in places
        ]
        return [(family, socket.SOCK_STREAM, 6, "", place) for family, place in kinds]


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, Path]:
    """For a server of that name, and what a client trusts it by."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    key, cert = folder / "key.pem", folder / "certificate.pem"
    command = f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
    alternative = ["-addext", f"subjectAltName=DNS:{name}", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *alternative], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context, cert
