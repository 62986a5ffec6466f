"""A client for chat completions of an OpenAI-compatible server; the standard library is enough.

It runs in the reward process. Only the named host is contacted: proxies of the environment are not
used, and redirects are not followed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

KEY_VARIABLE = "LOCALRL_JUDGE_KEY"
"""Variable of the environment whose value is sent as the bearer token, and written nowhere."""
LOCAL = {"Ollama": "http://127.0.0.1:11434/v1", "LM Studio": "http://127.0.0.1:1234/v1"}
"""Addresses tried in turn if none is named."""
PAUSES_S = (0.5, 2.0)
"""Pauses before the second and third attempt of a request that may succeed later."""
LOOK_S = 30.0
"""Seconds allowed to list a server's models."""
LARGEST = 4 << 20
"""Most bytes of an answer."""
PIECE = 1 << 16
SHOWN = 200
"""Most characters of a server's error in a message."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class NoAnswer(Exception):
    """A request that gave no text; its message says why.

    again: True if a later attempt may succeed. gone: True if nobody listens, or the answer is late.
    """

    def __init__(self, message: str, *, again: bool = False, gone: bool = False) -> None:
        super().__init__(message)
        self.again, self.gone = again, gone


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server by the URL that its paths follow, as http://127.0.0.1:1234/v1."""

    url: str
    timeout_s: float
    """Seconds allowed per request."""

    def models(self) -> list[str]:
        """List the names of its models.

        Raises: NoAnswer.
        """
        found = self._request("GET", "/models", None, min(LOOK_S, self.timeout_s))
        entries = found.get("data") if isinstance(found, dict) else None
        if not isinstance(entries, list):
            raise NoAnswer(f"{self.url}/models lists no models: {_short(found)}")
        return [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]

    def complete(self, model: str, content: str, max_tokens: int) -> str:
        """Return the model's greedy answer to one user message.

        A request that was refused for now, or cut off, is repeated after a pause; one that timed
        out is not.

        Raises: NoAnswer, also if the answer was cut off at `max_tokens`.
        """
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": False,
        }
        for pause_s in PAUSES_S:
            try:
                return _text(self._request("POST", "/chat/completions", body, self.timeout_s))
            except NoAnswer as error:
                if not error.again:
                    raise
            time.sleep(pause_s)
        return _text(self._request("POST", "/chat/completions", body, self.timeout_s))

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> Any:
        """Return the JSON of an answer."""
        url = urlsplit(self.url)
        kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=timeout_s)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        reached = False
        try:
            connection.connect()
            reached = True
            connection.request(method, url.path + path, data, headers)
            response = connection.getresponse()
            text = _read(response, time.monotonic() + timeout_s)
        except TimeoutError:
            raise NoAnswer(f"{self.url} did not answer within {timeout_s:g} s", gone=True) from None
        except (OSError, HTTPException, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise NoAnswer(f"{self.url}: {why}", again=True, gone=not reached) from None
        finally:
            connection.close()
        if not 200 <= response.status < 300:
            later = response.status == 429 or response.status >= 500
            raise NoAnswer(f"{self.url}: HTTP {response.status} {_reason(text)}", again=later)
        return _parsed(text)


def read_url(url: str) -> str:
    """Check an address and return it without a slash at its end.

    Raises: ValueError if it is not one of http or https, or would carry the key unencrypted.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"url is {url!r}: {error}") from None
    plain = not (parts.query or parts.fragment or parts.username or parts.password)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ValueError(f"url is {url!r}; write it as in http://127.0.0.1:11434/v1")
    if os.environ.get(KEY_VARIABLE) and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise ValueError(f"url is {url!r}; {KEY_VARIABLE} is only sent over https")
    return url.rstrip("/")


def find_server(url: str | None, model: str | None, timeout_s: float) -> tuple[Server, str]:
    """Return the server of a URL, or the first local one that answers, and the model to ask.

    Nothing is contacted if both are named.

    Raises: NoAnswer if there is no server, or it has not exactly one model and none is named.
    """
    if url and model:
        return Server(url, timeout_s), model
    server, models = _first_of([url] if url else list(LOCAL.values()), timeout_s)
    if model:
        return server, model
    if len(models) == 1:
        return server, models[0]
    listed = ", ".join(models) or "none"
    raise NoAnswer(
        f"{server.url} has {len(models)} models ({listed:.{SHOWN}}). Name one: task.judge_model"
    )


def _first_of(urls: list[str], timeout_s: float) -> tuple[Server, list[str]]:
    errors = []
    for url in urls:
        server = Server(url, timeout_s)
        try:
            return server, server.models()
        except NoAnswer as error:
            errors.append(str(error))
    told = "; ".join(errors)
    if len(urls) == 1:
        raise NoAnswer(told, gone=True)
    raise NoAnswer(
        f"neither {' nor '.join(LOCAL)} answers on this machine ({told}). Start one, or name "
        "another server: task.judge_url",
        gone=True,
    )


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """Read a body piece by piece, so that one that trickles in meets the deadline too."""
    pieces, size = [], 0
    while piece := response.read1(PIECE):
        size += len(piece)
        pieces.append(piece)
        if size > LARGEST:
            raise NoAnswer(f"the answer has more than {LARGEST} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:  # read1 does not complain of a body that ends early
        raise NoAnswer("the connection was closed in the middle", again=True)
    return b"".join(pieces)


def _text(answer: Any) -> str:
    """Return the text of a chat completion."""
    try:
        [choice] = answer["choices"]
        text = choice["message"]["content"]
        reason = choice.get("finish_reason")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise NoAnswer(f"the answer is no chat completion: {_short(answer)}") from None
    if reason == "length":
        raise NoAnswer("the answer was cut off; raise task.judge_max_tokens")
    if not isinstance(text, str) or not text.strip():
        raise NoAnswer(f"the answer has no text: {_short(answer)}")
    return text


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        raise NoAnswer(f"the answer is not JSON: {_short(text.decode(errors='replace'))}") from None


def _reason(text: bytes) -> str:
    """Return a server's own words on an error."""
    try:
        error = json.loads(text)["error"]
        return _short(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        return _short(text.decode(errors="replace"))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
