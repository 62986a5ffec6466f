"""The address that agents call: OpenAI's chat completions, on this machine, with the run's token.

Each agent has an address of its own, `http://127.0.0.1:PORT/NUMBER/v1`. A request waits in its
agent's tray until the run takes and answers it; nothing is computed or loaded here.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from localrl.agents.chat import streamed
from localrl.serving.requests import (
    Body,
    Refused,
    ServedFacts,
    error_body,
    read_body,
    read_request,
)
from localrl.utils.hosts import LOOPBACK

RESULT = "result"
"""Last part of the address at which the end of an agent is reported."""
CHAT = ("v1/chat/completions", "chat/completions")
MODELS = ("v1/models", "models")
LOOK_S = 0.05
"""Seconds between two looks at whether the run is to stop and the agents' process is well."""


@dataclass(eq=False)
class Request:
    """A request that waits for its answer."""

    body: Body
    _answered: threading.Event = field(default_factory=threading.Event)
    _answer: tuple[int, str, bytes] = (500, "", b"")

    def answer(self, value: Mapping[str, Any]) -> None:
        """Answer with a completion, as a stream if the request asks for one."""
        if self.body.get("stream"):
            usage = self.body.get("stream_options", {}).get("include_usage", False)
            events = "".join(streamed(value, usage=usage))
            self._give(200, "text/event-stream", events.encode())
        else:
            self._give(200, "application/json", json.dumps(value).encode())

    def refuse(self, message: str, status: int = 400) -> None:
        """Answer with an error."""
        self._give(status, "application/json", _error(message))

    def wait(self) -> tuple[int, str, bytes]:
        """Return status, type and body of the answer, once there is one."""
        self._answered.wait()
        return self._answer

    def _give(self, status: int, kind: str, body: bytes) -> None:
        self._answer = (status, kind, body)
        self._answered.set()


@dataclass(eq=False)
class Tray:
    """Requests, or a result, that an agent has sent and the run has not taken yet."""

    requests: deque[Request] = field(default_factory=deque)
    result: Mapping[str, Any] | None = None
    """The report of its end: `value`, or `failure` and perhaps `traceback`."""

    @property
    def settled(self) -> bool:
        """True if the agent waits for the model, or has ended."""
        return bool(self.requests) or self.result is not None


class AgentServer(ThreadingHTTPServer):
    """Receives agents' requests. Its threads only fill trays; the run's thread empties them."""

    daemon_threads = True
    request_queue_size = 1024  # all agents of a step connect at once

    def __init__(self, vocabulary: int) -> None:
        self.token = secrets.token_urlsafe(24)
        self.facts = ServedFacts((), vocabulary, None)
        self._trays: dict[int, Tray] = {}
        self._awaited: set[int] = set()
        self._changed = threading.Condition()
        super().__init__((LOOPBACK, 0), _AgentHandler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The address that agents' numbers are added to."""
        return f"http://{LOOPBACK}:{self.server_address[1]}"

    def open(self, numbers: Sequence[int]) -> None:
        """Begin to listen to agents with these numbers."""
        with self._changed:
            self._trays |= {number: Tray() for number in numbers}

    def close_tray(self, number: int) -> None:
        """Listen to an agent no longer; what it still asks is refused."""
        with self._changed:
            tray = self._trays.pop(number, Tray())
        for request in tray.requests:
            request.refuse("this completion has ended", 410)

    def close_all(self) -> None:
        """Listen to no agent any longer."""
        for number in list(self._trays):
            self.close_tray(number)

    def put(self, number: int, request: Request) -> bool:
        """Put a request into an agent's tray; False if the agent is not listened to."""
        return self._fill(number, lambda tray: tray.requests.append(request))

    def end(self, number: int, result: Mapping[str, Any]) -> bool:
        """Put the report of an agent's end into its tray; False if it is not listened to."""
        return self._fill(number, lambda tray: setattr(tray, "result", result))

    def wait(self, numbers: Sequence[int], until: float, look: Callable[[], bool]) -> list[int]:
        """Wait until these agents have settled, or a moment (monotonic, in seconds) has passed.

        look: called now and then; the waiting also ends when it returns False. Returns the agents
        that have not settled.
        """
        while True:
            with self._changed:
                self._awaited = {n for n in numbers if not self._trays[n].settled}
                left = until - time.monotonic()
                if self._awaited and left > 0:
                    self._changed.wait(min(left, LOOK_S))
                waiting = sorted(self._awaited)
            if not waiting or left <= 0 or not look():
                return waiting

    def take(self, number: int) -> Request | Mapping[str, Any]:
        """Take an agent's oldest request, or the report of its end if it has none.

        A request that the agent left behind when it ended is not taken.
        """
        with self._changed:
            tray = self._trays[number]
            return tray.requests.popleft() if tray.result is None else tray.result

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""

    def server_close(self) -> None:
        """Stop listening, and refuse what waits."""
        self.shutdown()
        super().server_close()
        self.close_all()

    def _fill(self, number: int, change: Callable[[Tray], object]) -> bool:
        with self._changed:
            if number not in self._trays:
                return False
            change(self._trays[number])
            self._awaited.discard(number)
            if not self._awaited:
                self._changed.notify_all()
            return True


class _AgentHandler(BaseHTTPRequestHandler):
    """Reads one agent's requests, and waits for the answers."""

    server: AgentServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "localrl", ""
    wbufsize = -1  # an answer is one packet
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Answer a chat request once the model has written, or take an agent's result."""
        try:
            number, path = self._place()
            data = read_body(self.headers, self.rfile)
            if path == RESULT:
                if not self.server.end(number, read_result(data)):
                    raise Refused("this completion has ended", 410)
                self._send(200, "application/json", b"{}")
                return
            if path not in CHAT:
                raise Refused(f"there is no {self.path!r:.80}; chat completions alone", 404)
            request = Request(read_request(data, self.server.facts))
            if not self.server.put(number, request):
                raise Refused("this completion has ended", 410)
            self._send(*request.wait())
        except Refused as error:
            self.close_connection = True  # the body may not have been read
            self._send(error.status, "application/json", _error(str(error)))

    def do_GET(self) -> None:
        """List the model, under the one name that clients need not use."""
        try:
            _, path = self._place()
            if path not in MODELS:
                raise Refused(f"there is no {self.path!r:.80}", 404)
            entry = {"id": "localrl", "object": "model", "created": 0, "owned_by": "localrl"}
            body = json.dumps({"object": "list", "data": [entry]}).encode()
            self._send(200, "application/json", body)
        except Refused as error:
            self._send(error.status, "application/json", _error(str(error)))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of single requests."""

    def _place(self) -> tuple[int, str]:
        """Return the agent's number and the rest of the path.

        Raises: Refused without the run's token, or for no such path.
        """
        given = self.headers.get("Authorization", "")
        wanted = f"Bearer {self.server.token}"
        if not hmac.compare_digest(given.encode(), wanted.encode()):
            raise Refused("the token of this run is needed as the api_key", 401)
        number, _, path = self.path.partition("?")[0].strip("/").partition("/")
        if not (number.isascii() and number.isdecimal()):
            raise Refused(f"there is no {self.path!r:.80}", 404)
        return int(number), path

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


def read_result(data: bytes) -> Mapping[str, Any]:
    """Read the report of an agent's end.

    Raises: Refused.
    """
    try:
        result = json.loads(data)
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict):
        raise Refused("a result is a JSON object")
    return result


def _error(message: str) -> bytes:
    return json.dumps(error_body(message)).encode()
