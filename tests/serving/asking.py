"""A plain client of a served model, by urllib."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from waiting import DEADLINE_S

from localrl.serving.model import Names, ServedModel, ServeLimits
from localrl.serving.server import ChatServer


@contextmanager
def served(policy: Any, names: Names, **changes: Any) -> Iterator[ChatServer]:
    limits = {"max_tokens": 12, "temperature": 0.0, "rows": 8, "cache_bytes": None, **changes}
    with ChatServer(ServedModel(policy, names, ServeLimits(**limits)), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def fetch(url: str, data: bytes | None = None, **headers: str) -> tuple[int, str]:
    """The status and the body of an answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **named})
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def post(server: ChatServer, body: Any, **headers: str) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return fetch(f"{server.url}/chat/completions", data, **headers)


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def chat(server: ChatServer, text: str = "hello", **options: Any) -> dict[str, Any]:
    """The answer to a message: the only choice of the completion."""
    status, body = post(server, {"messages": user(text), **options})
    assert status == 200, body
    [choice] = json.loads(body)["choices"]
    return choice


def stream(server: ChatServer, text: str = "hello", **options: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed answer."""
    status, body = post(server, {"messages": user(text), "stream": True, **options})
    assert status == 200, body
    lines = [line for line in body.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def greedy(policy: Any, text: str, tokens: int) -> str:
    """The model's own likeliest answer, by mlx-lm alone."""
    from mlx_lm import generate

    prompt = list(policy.tokenizer.encode(user(text)))
    return generate(policy.model, policy.tokenizer.inner, prompt, max_tokens=tokens)
