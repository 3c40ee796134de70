"""A server of /chat/completions that fails, stalls, limits, cuts connections and answers rubbish, as a test's plan says."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data import prompt

KEY = "sk-test-4f9a7c21e8b35d60-secret"
TOOLS = [{"name": "weather", "description": "Weather of a city.", "parameters": {"city": {"type": "string"}}}]


def right_reply(row: int) -> str:
    return prompt.reply([{"name": "weather", "arguments": {"city": f"Město {row}"}}], f"Row {row} names a city.")


def completion(message: dict, finish: str | None = "stop") -> dict:
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }


class BadServer:
    """/v1/chat/completions. `plan(row, nth)` says what becomes of the nth request (from 0) for a row: see `_do`."""

    def __init__(self, plan):
        self.log: list[tuple[float, int, str, dict]] = []  # (time, row, action, request) of all requests
        self.keys: set[str | None] = set()
        self.under_way = self.most_under_way = 0
        self.release = threading.Event()  # of those who stall
        self._lock, self._seen = threading.Lock(), Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                row = int(re.search(r"task (\d+)", request["messages"][-1]["content"])[1])
                with outer._lock:
                    todo = plan(row, outer._seen[row])
                    action, *details = [todo] if isinstance(todo, str) else todo
                    outer._seen[row] += 1
                    outer.log.append((time.monotonic(), row, action, request))
                    outer.keys.add(self.headers.get("Authorization"))
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                try:
                    outer._do(self, row, action, details)
                except OSError:
                    pass  # the client has gone
                finally:
                    with outer._lock:
                        outer.under_way -= 1

            def log_message(self, *_):
                pass

        class Http(ThreadingHTTPServer):
            request_queue_size = 128  # of 5, connections break where many come at once

        self._http = Http(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release.set()
        self._http.shutdown()
        self._http.server_close()

    def _do(self, handler, row, action, details):
        def send(body, status=200, headers=None):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            handler.send_response(status)
            for name, value in (headers or {}).items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)

        good, headers = completion({"content": right_reply(row)}), details[0] if details else None
        match action:
            case "good":
                send(good, headers=headers)
            case "slow":
                time.sleep(details[0])
                send(good)
            case "stall":
                self.release.wait(120)
                send(good)
            case "wrong":
                send(completion({"content": right_reply(row + 1)}))
            case "say":
                send(completion(*details))
            case "rubbish":
                send(b"<html>\xff not JSON</html>")
            case "none":
                send(completion({"content": None}))
            case "no choices":
                send({"choices": []})
            case "cut":
                data = json.dumps(good).encode()
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data[: len(data) // 2])
                handler.wfile.flush()
                handler.connection.shutdown(socket.SHUT_RDWR)
            case "hang up":
                handler.connection.shutdown(socket.SHUT_RDWR)
            case "status":
                status, body, *rest = details
                send(body, status, *rest)
            case _:
                raise AssertionError(action)

    def rows(self, action=None):
        return [row for _, row, what, _ in self.log if action is None or what == action]
