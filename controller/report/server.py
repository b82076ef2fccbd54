"""`rlhf-dist watch`: the page of a run, served while it goes on.

    browser                                    this process
    GET /TOKEN/            once         --->   the page, without data
    GET /TOKEN/data        every 2 s    --->   304, or what the files say now (read again where they have changed)
    GET /TOKEN/block/NAME  when looked at -->  one file of rollouts

It listens on the loopback interface only. Whoever else has an account on this machine does not know the token; a page
of another site in the same browser neither knows it nor, since a name of its own is in the Host header, gets an answer.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sys
import threading
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from controller.report.page import data_of, packed, page
from controller.report.payload import run_payload
from controller.report.rollouts import RolloutFile, list_rollouts, read_block
from controller.report.run_files import read_run
from rlhf_dist.typed import ConfigError

LOOPBACK = "127.0.0.1"
IDLE_S = 30.0
"""Longest that a connection may say nothing."""
GONE = (ConnectionError, TimeoutError)
"""A browser that does not wait for its answer."""
BLOCK_BYTES = 64 << 20
"""Most of one file of rollouts that is sent at once."""


def serve(folder: Path, port: int = 0) -> None:
    """Serve the page of a run until Ctrl-C. Raises ConfigError for what is no run, or a port that is taken."""
    watched = Watched(folder)
    watched.data()
    try:
        server = make_server(watched, port)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port {port} on {LOOPBACK} cannot be listened to ({error}); leave it out for one that can"
        ) from error
    with server, suppress(KeyboardInterrupt):
        print(f"http://{LOOPBACK}:{server.server_port}/{server.token}/   (Ctrl-C ends it)", flush=True)
        server.serve_forever(poll_interval=0.2)


class Watched:
    """A run's folder, read again when it has changed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._stamp: tuple[Any, ...] | None = None
        self._data, self._mark = b"", ""
        self._entries: dict[RolloutFile, dict[str, Any]] = {}
        self._files: dict[str, RolloutFile] = {}

    def data(self) -> tuple[bytes, str]:
        """Compressed data of the page, and a mark that is another one where it has changed. Raises ConfigError."""
        with self._lock:
            files, unreadable = list_rollouts(self._folder)
            stamp = (*(_stamp(path) for path in sorted(self._folder.glob("*.json*"))), *files, *unreadable)
            if stamp != self._stamp:
                run = read_run(self._folder)
                payload = run_payload(run, [self._entry(file) for file in files], unreadable)
                self._data = packed(data_of([run], [payload]))
                self._stamp, self._mark = stamp, f'"{hashlib.sha256(self._data).hexdigest()[:16]}"'
            return self._data, self._mark

    def block(self, name: str) -> bytes | None:
        """The compressed columns of a file of rollouts; None for a name that was never given out."""
        file = self._files.get(name)
        return None if file is None else packed(read_block(file, BLOCK_BYTES).columns)

    def page(self) -> bytes:
        """The page itself."""
        return "".join(page([read_run(self._folder)], (), live=True)).encode()

    def _entry(self, file: RolloutFile) -> dict[str, Any]:
        if file not in self._entries:
            name = f"f{len(self._files)}"
            self._files[name] = file
            self._entries[file] = {**read_block(file, BLOCK_BYTES).entry, "block": name}
        return self._entries[file]


def _stamp(path: Path) -> tuple[str, int, int]:
    about = path.stat()
    return path.name, about.st_mtime_ns, about.st_size


class Server(ThreadingHTTPServer):
    """Answers who knows the token."""

    daemon_threads = True

    def __init__(self, watched: Watched, port: int) -> None:
        self.watched, self.token = watched, secrets.token_urlsafe(24)
        super().__init__((LOOPBACK, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing of a browser that was closed; the traceback of anything else."""
        if not isinstance(sys.exception(), GONE):
            super().handle_error(request, client_address)

    def allows(self, host: str) -> bool:
        """Whether a Host header is ours: a name that was made to mean 127.0.0.1 (DNS rebinding) is not."""
        return host in (f"{LOOPBACK}:{self.server_port}", f"localhost:{self.server_port}")


def make_server(watched: Watched, port: int = 0) -> Server:
    """A server that listens; port 0 takes a free one."""
    return Server(watched, port)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = IDLE_S
    server_version, sys_version = "rlhf-dist", ""

    def do_GET(self) -> None:
        _, token, *rest = [*self.path.partition("?")[0].split("/"), ""]
        if not self.server.allows(self.headers.get("Host", "")) or not hmac.compare_digest(
            token.encode(), self.server.token.encode()
        ):
            return self._send(HTTPStatus.NOT_FOUND, b"not found", "text/plain")
        try:
            self._answer("/".join(rest).rstrip("/"))
        except GONE:
            raise
        except (ConfigError, OSError) as error:  # a run that is being replaced has no files for a moment
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode(), "text/plain")

    def _answer(self, asked: str) -> None:
        if asked == "":
            return self._send(HTTPStatus.OK, self.server.watched.page(), "text/html; charset=utf-8")
        if asked == "data":
            data, mark = self.server.watched.data()
            if self.headers.get("If-None-Match") == mark:
                return self._send(HTTPStatus.NOT_MODIFIED, b"", "application/json", ETag=mark)
            return self._packed(data, ETag=mark)
        block = self.server.watched.block(asked.removeprefix("block/"))
        if block is None:
            return self._send(HTTPStatus.NOT_FOUND, b"there is no such file of rollouts", "text/plain")
        return self._packed(block)

    def _packed(self, data: bytes, **headers: str) -> None:
        self._send(HTTPStatus.OK, data, "application/json", **{"Content-Encoding": "gzip"}, **headers)

    def _send(self, status: HTTPStatus, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        always = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}
        if status != HTTPStatus.NOT_MODIFIED:
            headers |= {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in {**headers, **always, "Referrer-Policy": "no-referrer"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the address, and so the token, would be in every line."""
