"""A stand-in for the hub and for a package index on 127.0.0.1, which can misbehave on demand."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """What goes wrong with a file; each counts down by one when it happens."""

    cut_after: int | None = None  # close the connection after so many bytes of the body
    stall_after: int | None = None  # send nothing more, but keep the connection open
    times: int = 1
    ignore_range: bool = False  # always send the whole file, with status 200
    status: int | None = None
    pause_per_chunk: float = 0.0


@dataclass
class StandIn:
    """Files by path, JSON pages by path, faults by path, and a record of what was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    pages: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)  # path, range, login
    bytes_sent: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def asked(self, path: str) -> list[str | None]:
        """The Range headers of the requests for ``path``."""
        return [wanted for asked, wanted, _ in self.requests if asked == path]

    def add_repository(self, name: str, files: dict[str, bytes], commit: str = "c0ffee") -> None:
        """A model repository, with large files redirected as the real hub does."""
        siblings = []
        for file, content in files.items():
            entry: dict[str, object] = {"rfilename": file, "size": len(content)}
            if len(content) > 2000:
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            blob = b"blob %d\0" % len(content) + content
            entry["blobId"] = hashlib.sha1(blob).hexdigest()
            siblings.append(entry)
            where = f"/{name}/resolve/{commit}/{file}"
            if "lfs" in entry:
                self.redirects[where] = f"/cdn/{name}/{file}"
                self.files[f"/cdn/{name}/{file}"] = content
            else:
                self.files[where] = content
        answer = json.dumps({"sha": commit, "siblings": siblings}).encode()
        self.pages[f"/api/models/{name}/revision/main"] = ("application/json", answer)

    def add_index(self, project: str, wheel: str, content: bytes, as_json: bool = False) -> None:
        """A package index (PEP 503 or PEP 691) with one wheel."""
        self.files[f"/files/{wheel}"] = content
        if as_json:
            entry = {"filename": wheel, "url": f"../../files/{wheel}", "hashes": {}}
            page = json.dumps({"meta": {"api-version": "1.0"}, "name": project, "files": [entry]})
            kind = "application/vnd.pypi.simple.v1+json"
        else:
            digest = hashlib.sha256(content).hexdigest()
            page = f'<html><body><a href="../../files/{wheel}#sha256={digest}">{wheel}</a></body></html>'
            kind = "text/html"
        self.pages[f"/simple/{project}/"] = (kind, page.encode())


@contextmanager
def serve() -> Iterator[StandIn]:
    """Run a stand-in for the length of a block."""
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            state.requests.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
            fault = state.faults.get(path, Fault(times=0))
            if fault.status is not None and fault.times > 0:
                fault.times -= 1
                self.send_error(fault.status)
            elif path in state.redirects:
                self.send_response(302)
                target = state.redirects[path]
                self.send_header("Location", target if target.startswith("http") else state.url + target)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif path in state.pages:
                kind, content = state.pages[path]
                self._head(200, len(content), {"Content-Type": kind})
                self.wfile.write(content)
            elif path in state.files:
                self._send_file(state.files[path], fault)
            else:
                self.send_error(404)

        def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def _send_file(self, content: bytes, fault: Fault) -> None:
            wanted = self.headers.get("Range")
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
            if fault.ignore_range:
                start = 0
            if start and start >= len(content):
                self.send_error(416)
                return
            body = content[start:]
            if start:
                place = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self._head(206, len(body), {"Content-Range": place})
            else:
                self._head(200, len(body), {})
            limit = fault.cut_after if fault.cut_after is not None else fault.stall_after
            if fault.times <= 0 or limit is None:
                limit = len(body)
            sent = 0
            while sent < min(limit, len(body)):
                chunk = body[sent : min(sent + 65536, limit)]
                self.wfile.write(chunk)
                self.wfile.flush()
                sent += len(chunk)
                state.bytes_sent += len(chunk)
                time.sleep(fault.pause_per_chunk)
            if sent < len(body):
                fault.times -= 1
                if fault.stall_after is not None:
                    state.released.wait(20)
                self.close_connection = True
                self.connection.close()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            pass  # clients that go away are part of the tests

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()


def make_wheel(member: str, content: bytes) -> bytes:
    """A wheel that holds one data file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("package/__init__.py", "raise SystemExit('this must never be imported')\n")
    return buffer.getvalue()
