"""Chat templates, parent side: rendering runs in a child process with limits and is cached.

One child serves the whole process. Prompts recur in later epochs and in every evaluation, so texts
are cached up to a bound.
"""

from __future__ import annotations

import atexit
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, TypeVar

from localrl.errors import ConfigError, DataError
from localrl.processes.worker import Reply, Worker
from localrl.settings import ModelConfig

TIME_LIMIT_S = 10.0
"""Time limit for one batch of conversations, in seconds."""
MEMORY_LIMIT = 512 << 20
"""Memory limit of the child in bytes; an idle one uses about 30 MB."""
TEXT_LIMIT = 2_000_000
"""Maximum characters of one rendered conversation: more than any model here can read."""
BATCH = 256
"""Maximum conversations per call."""
BATCH_CHARACTERS = 4 << 20
"""Characters of conversations from which on a call takes no more of them."""
SHOWN = 200
"""Maximum characters of a conversation, or of a template's reason, in an error."""
KEPT = 8 << 20
"""Maximum characters of cached texts and their keys."""

THINKING = {"auto": None, "on": True, "off": False}
"""Values of `model.thinking`; `auto` leaves the choice to the template."""

Value = TypeVar("Value")
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


@dataclass(eq=False)
class ChatTemplate:
    """The chat template of a model, with a cache of rendered texts."""

    sources: Mapping[str, str]
    """Templates by name: `default`, and `tool_use` if a model has a separate one for tools."""
    variables: Mapping[str, Any]
    """Variables besides the conversation: special tokens, `enable_thinking`."""
    date: str | None = None
    """The day that the template sees, as YYYY-MM-DD; None for today."""
    _texts: dict[str, str] = field(default_factory=dict)
    _size: int = 0

    def render(
        self,
        conversations: Sequence[Messages],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> list[str]:
        """Render each conversation to text.

        Raises: DataError if the template refuses one; ConfigError if it takes too much time or
        memory, or produces too much text.
        """
        return [
            settled(result)
            for result in self.attempt(
                conversations, tools=tools, add_generation_prompt=add_generation_prompt
            )
        ]

    def attempt(
        self,
        conversations: Sequence[Messages],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> list[str | DataError]:
        """Render each conversation to text, or return the error that `render` would raise for it.

        Raises: ConfigError if the template takes too much time or memory, or produces too much
        text.
        """
        keys = [
            json.dumps([list(map(dict, messages)), tools, add_generation_prompt], default=repr)
            for messages in conversations
        ]
        found: dict[str, str | DataError] = {
            key: self._texts[key] for key in keys if key in self._texts
        }
        missing = {
            key: messages
            for key, messages in zip(keys, conversations, strict=True)
            if key not in found
        }
        for batch in _batches(missing):
            results = self._call([missing[key] for key in batch], tools, add_generation_prompt)
            found |= zip(batch, results, strict=True)
        self._keep({key: text for key in missing if isinstance(text := found[key], str)})
        return [found[key] for key in keys]

    def source(self, tools: Tools | None) -> str:
        """Return the template for a conversation with these tools.

        Raises: ConfigError if there are several and none applies.
        """
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise ConfigError(
                f"The model has chat templates named {', '.join(self.sources)}, but no default."
            )
        return self.sources[name]

    def _call(
        self, conversations: Sequence[Messages], tools: Tools | None, add_generation_prompt: bool
    ) -> list[str | DataError]:
        reply = _worker().call(
            "localrl.policy.template:render",
            {
                "template": self.source(tools),
                "conversations": [list(map(dict, messages)) for messages in conversations],
                "variables": self.variables,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                "limit": TEXT_LIMIT,
                "date": self.date,
            },
        )
        if not reply.ok:
            raise ConfigError(
                f"The model's chat template is refused: rendering it {_told(reply)}. Fix the "
                "template in the model's folder, or use another model."
            )
        refused = reply.value["refused"]
        return [
            _refusal(conversations[index], refused[str(index)]) if text is None else text
            for index, text in enumerate(reply.value["texts"])
        ]

    def _keep(self, texts: Mapping[str, str]) -> None:
        """Cache the texts, and evict the oldest ones beyond the bound."""
        for key, text in texts.items():
            self._texts[key] = text
            self._size += len(key) + len(text)
        while self._size > KEPT:
            key = next(iter(self._texts))
            self._size -= len(key) + len(self._texts.pop(key))


def _batches(keys: Iterable[str]) -> Iterator[list[str]]:
    """Split conversations, given by their JSON, into those of one call each."""
    batch, size = [], 0
    for key in keys:
        if batch and (len(batch) == BATCH or size + len(key) > BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(key)
        size += len(key)
    if batch:
        yield batch


def settled(result: Value | DataError) -> Value:
    """Return a result, or raise the error that stands in its place."""
    if isinstance(result, DataError):
        raise result
    return result


def thinking_switch(template: Mapping[str, str], wish: str) -> dict[str, bool]:
    """Return the template variables set by `model.thinking`.

    Raises: ConfigError if thinking is switched on or off but the template has no such switch.
    """
    value = THINKING[wish]
    if value is None:
        return {}
    if not any("enable_thinking" in source for source in template.values()):
        raise ConfigError(
            f"model.thinking is {wish!r}, but this model's chat template has no enable_thinking "
            "switch. Set it to 'auto'."
        )
    return {"enable_thinking": value}


def read_template(inner: Any, wish: ModelConfig) -> ChatTemplate | None:
    """Return the folder's template; None if there is none, it is not wanted, or mlx-lm has its own
    code for it.

    inner: mlx-lm's tokenizer. Raises: ConfigError for settings that cannot be had.
    """
    source = inner.chat_template
    if source is None or inner._chat_template is not None or wish.chat_template == "off":
        if wish.thinking != "auto":
            thinking_switch({}, wish.thinking)
        return None
    sources: Mapping[str, str] = source if isinstance(source, dict) else {"default": source}
    tokens = {name: _token(token) for name, token in inner.special_tokens_map.items()}
    variables = {**tokens, **thinking_switch(sources, wish.thinking)}
    return ChatTemplate(sources, variables, _checked_date(wish.template_date))


def _checked_date(text: str | None) -> str | None:
    try:
        return text and date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ConfigError(f"model.template_date is {text!r}: {error}. Write YYYY-MM-DD.") from None


def _token(token: Any) -> Any:
    return [str(t) for t in token] if isinstance(token, (list, tuple)) else str(token)


def _told(reply: Reply) -> str:
    message = _plain(reply.message.rstrip("."))
    return f"failed with {message}" if reply.failure == "raised" else message


def _refusal(messages: Messages, reason: str) -> DataError:
    return DataError(
        f"The model's chat template cannot render the conversation {_shown(messages)}: "
        f"{_plain(reason.rstrip('.'))}. Change the task's messages, or use another model."
    )


def _shown(messages: Messages) -> str:
    listed = [dict(message) for message in messages]
    return _plain(json.dumps(listed, ensure_ascii=False, default=repr))


def _plain(text: str) -> str:
    """Truncate a text from a model's folder and replace unprintable characters."""
    shown = "".join(c if c.isprintable() else "�" for c in text[:SHOWN])
    return shown if len(text) <= SHOWN else f"{shown}..."


@functools.cache
def _worker() -> Worker:
    """Return the rendering child, started by the first call and ended with this process."""
    worker = Worker(time_limit_s=TIME_LIMIT_S, memory_limit_bytes=MEMORY_LIMIT)
    atexit.register(worker.close)
    return worker
