"""The page on this machine's own address (127.0.0.1), which no other machine reaches, reading on while a run writes.

`/` is the page, `/data/NAME` a part of it. The page asks for `/data/runs?since=VERSION` every two seconds; that reads what is
new, and answers 204 where nothing is.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from grpo_jax.report.page import Page, html

HOST = "127.0.0.1"


def make(page: Page, port: int) -> ThreadingHTTPServer:
    """A server of the page, bound to HOST; port 0: one that is free. `serve_forever` runs it. OSError: the port is taken."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A foreign site may have its name lead to this address; its pages must not read these.
            if (self.headers.get("Host") or "").rpartition(":")[0] not in (HOST, "localhost"):
                return self._send(403, "text/plain", b"this page is for this machine alone")
            asked = urlsplit(self.path)
            if asked.path == "/":
                return self._send(200, "text/html; charset=utf-8", "".join(html(page.title, live=True)).encode())
            with lock:
                status, kind, body = self._part(asked.path.removeprefix("/data/"), parse_qs(asked.query).get("since"))
            return self._send(status, kind, body)

        def _part(self, name: str, since: list[str] | None) -> tuple[int, str, bytes]:
            if name == "runs":
                try:
                    page.update()
                except (ValueError, OSError) as error:
                    return 500, "text/plain; charset=utf-8", str(error).encode("utf-8", "backslashreplace")
                if since == [str(page.version)]:
                    return 204, "text/plain", b""
            body = page.part(name)
            return (404, "text/plain", b"no such part") if body is None else (200, "application/octet-stream", body)

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: a page asks every two seconds."""

    return ThreadingHTTPServer((HOST, port), Handler)
