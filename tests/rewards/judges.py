"""A small real HTTP server that answers like a judge, or as badly as a test wishes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | bytes | tuple[int, str | bytes]
"""The text of a completion, the raw bytes of a body, or a status with either."""


def completion(text: Any, **choice: Any) -> bytes:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text}
    return json.dumps(
        {"choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}]}
    ).encode()


class JudgeServer(ThreadingHTTPServer):
    """Answers each question by a function of its text, and keeps what it was sent."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str], Answer], models: tuple[str, ...], port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer, self.models = answer, models
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.pause_s = 0.0
        self.missing = 0
        """Bytes that are announced and not sent with the rest."""
        self.drips = False
        """True if they are sent one by one."""
        self.together = self.most_together = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.asked]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_GET(self) -> None:
        data = [{"id": name, "object": "model"} for name in self.server.models]
        self._send(200, json.dumps({"object": "list", "data": data}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.together += 1
            self.server.most_together = max(self.server.most_together, self.server.together)
        time.sleep(self.server.pause_s)
        try:
            answer = self.server.answer(body["messages"][0]["content"])
        finally:
            with self.server.lock:
                self.server.together -= 1
        status, said = answer if isinstance(answer, tuple) else (200, answer)
        self._send(status, said if isinstance(said, bytes) else completion(said))

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(data) + self.server.missing))
        self.end_headers()
        self.wfile.write(data)
        for _ in range(self.server.missing if self.server.drips else 0):
            self.wfile.write(b" ")  # which ends with an error once the client is gone
            time.sleep(0.02)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def judge_server(
    answer: Callable[[str], Answer], models: tuple[str, ...] = ("judge-1",), port: int = 0
) -> Iterator[JudgeServer]:
    """Serve while it is used, on a free port unless one is named."""
    with JudgeServer(answer, models, port) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
