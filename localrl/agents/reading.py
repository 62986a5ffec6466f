"""Requests of agents as prompts: checked, rendered all together, and encoded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from localrl.agents.chat import for_template
from localrl.agents.conversations import Asked
from localrl.agents.server import Request
from localrl.errors import ConfigError, DataError
from localrl.policy.tokenizer import Tokenizer
from localrl.policy.turns import check_tools
from localrl.serving.requests import Body

NEUTRAL: Mapping[str, Any] = {
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p", "top_k"), 0),
    **{"top_p": 1, "repetition_penalty": 1, "logit_bias": {}, "seed": None, "temperature": None},
}
"""Settings of sampling that requests may have, and values that change nothing; the run's count."""


Messages = tuple[Mapping[str, Any], ...]
Tools = tuple[Mapping[str, Any], ...]


@dataclass(eq=False)
class RequestReader:
    """Reads requests for one model."""

    tokenizer: Tokenizer
    warn: Callable[[str], None]
    _told: bool = False

    def read(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Asked]]:
        """Yield the requests that can be answered, by number; the others are refused.

        Raises: ConfigError, see `ChatTemplate.attempt`.
        """
        groups: dict[str, dict[int, tuple[Messages, Tools]]] = {}
        for number, request in requests.items():
            try:
                messages, tools = self._check(request.body)
                groups.setdefault(json.dumps(tools), {})[number] = (messages, tools)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                request.refuse(f"{type(error).__name__}: {error}")
            except (DataError, ConfigError) as error:
                request.refuse(str(error))
        for group in groups.values():
            tools = next(iter(group.values()))[1] or None
            texts = self.tokenizer.attempt([messages for messages, _ in group.values()], tools)
            for (number, parts), text in zip(group.items(), texts, strict=True):
                if (asked := self._encode(requests[number], parts, text)) is not None:
                    yield number, asked

    def _check(self, body: Body) -> tuple[Messages, Tools]:
        """Return the conversation of a request and its tools.

        Raises: whatever is wrong with it.
        """
        _check_rest(body)
        tools = tuple(body.get("tools", ()))
        if tools:
            check_tools(self.tokenizer)
        self._tell_sampling(body)
        return tuple(for_template(body["messages"])), tools

    def _encode(
        self, request: Request, parts: tuple[Messages, Tools], text: str | DataError
    ) -> Asked | None:
        try:
            if isinstance(text, DataError):
                raise text
            ids = self.tokenizer.encode_prompt_text(text)
        except DataError as error:
            request.refuse(str(error))
            return None
        body = request.body
        stop = body.get("stop", ())
        return Asked(
            *parts,
            ids,
            body.get("max_completion_tokens", body.get("max_tokens")),
            (stop,) if isinstance(stop, str) else tuple(stop),
        )

    def _tell_sampling(self, body: Body) -> None:
        """Warn once of settings of sampling in a request."""
        named = [name for name, value in NEUTRAL.items() if body.get(name, value) != value]
        if named and not self._told:
            self._told = True
            self.warn(
                f"The agent's requests set {', '.join(named)}, which does nothing in training: all "
                "turns are sampled by the run's own settings (rollout.temperature)."
            )


def _check_rest(body: Body) -> None:
    """Check what `read_request` leaves to mlx-lm's server.

    Raises: ValueError.
    """
    for name in ("max_completion_tokens", "max_tokens"):
        most = body.get(name, 1)
        if type(most) is not int or most < 1:
            raise ValueError(f"{name} is {most!r}; give a whole number from 1")
    if body.get("top_logprobs"):
        raise ValueError("top_logprobs is not supported; logprobs are")
    if "chat_template_kwargs" in body:
        raise ValueError("chat_template_kwargs is not supported: set model.thinking of the run")
