"""A model that judges: several requests at a time, each different question asked once."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from localrl.rewards.chat_client import NoAnswer, Server, find_server, read_url

REMEMBERED = 20_000
"""Most answers kept for questions that come again."""

Answer = str | NoAnswer | None
"""A text, the reason why there is none, or None for no question."""


@dataclass
class Judge:
    """A model of a server, with the answers that it has given.

    Raises: ValueError for a setting that cannot work. Nothing is contacted.
    """

    url: str | None
    """None for Ollama or LM Studio on this machine."""
    model: str | None
    """None for the only model of the server."""
    max_tokens: int
    timeout_s: float
    """Seconds allowed per request."""
    parallel: int
    """Number of requests at a time."""
    _found: tuple[Server, str] | None = None
    _answers: dict[str, str] = field(default_factory=dict)
    """Earlier answers by the digest of the question."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _silent: int = 0
    """Number of requests in a row for which the server was gone."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "parallel"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if not isinstance(self.timeout_s, int | float) or not 0 < self.timeout_s <= 600:
            raise ValueError(f"timeout_s is {self.timeout_s!r}; it must be above 0, at most 600")
        self.url = read_url(self.url) if self.url else None

    def ask(self, questions: Sequence[str | None]) -> list[Answer]:
        """Return the answer to each question.

        Once the server was gone for as many requests in a row as there are at a time, the rest are
        not made.
        """
        different = [text for text in dict.fromkeys(questions) if text is not None]
        if not different:
            return [None] * len(questions)
        try:
            server, model = self._found = self._found or find_server(
                self.url, self.model, self.timeout_s
            )
        except NoAnswer as error:
            return [None if text is None else error for text in questions]
        self._silent = 0
        with ThreadPoolExecutor(self.parallel) as pool:
            found = list(pool.map(lambda text: self._ask(server, model, text), different))
        answers: dict[str | None, Answer] = dict(zip(different, found, strict=True))
        return [answers.get(text) for text in questions]

    def _ask(self, server: Server, model: str, question: str) -> str | NoAnswer:
        key = digest([server.url, model, self.max_tokens, question])
        with self._lock:
            if key in self._answers:
                return self._answers[key]
            if self._silent >= self.parallel:
                return NoAnswer(f"not asked, because {server.url} has stopped answering", gone=True)
        try:
            answer = server.complete(model, question, self.max_tokens)
        except NoAnswer as error:
            with self._lock:
                self._silent = self._silent + 1 if error.gone else 0
            return error
        with self._lock:
            self._silent = 0
            self._answers[key] = answer
            if len(self._answers) > REMEMBERED:
                del self._answers[next(iter(self._answers))]
        return answer


def find_judge(
    url: str | None = None, model: str | None = None, timeout_s: float = 120.0
) -> dict[str, str]:
    """Look for the judge of these settings: return its `url` and `model`, or the `problem`."""
    try:
        server, name = find_server(url, model, timeout_s)
    except NoAnswer as error:
        return {"problem": str(error)}
    try:
        server.models()
    except NoAnswer as error:
        if error.gone:  # a server need not list its models
            return {"problem": str(error)}
    return {"url": server.url, "model": name}


def digest(value: Any) -> str:
    """Return a key for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
