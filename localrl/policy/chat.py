"""Chat templates, our side: every rendering happens in a child process with limits, and is kept.

One child serves the whole process. Prompts come again in later epochs and in every evaluation, so
texts are kept, up to a bound.
"""

from __future__ import annotations

import atexit
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localrl.errors import ConfigError, DataError
from localrl.processes.worker import Reply, Worker

TIME_LIMIT_S = 10.0
"""For one batch of conversations."""
MEMORY_LIMIT = 512 << 20
"""Bytes of the child; an idle one has some 30 MB."""
TEXT_LIMIT = 2_000_000
"""Characters of one rendered conversation: more than any model here can read."""
BATCH = 256
"""Conversations in one call."""
SHOWN = 200
"""Characters of a conversation, and of a template's reason, in an error."""
KEPT = 8 << 20
"""Characters of texts and their keys that are kept."""

THINKING = {"auto": None, "on": True, "off": False}
"""The values of `model.thinking`; `auto` leaves it to the template."""

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


@dataclass(eq=False)
class ChatTemplate:
    """How a model wants conversations written."""

    sources: Mapping[str, str]
    """Templates by name: `default`, and `tool_use` where a model has one of its own for tools."""
    variables: Mapping[str, Any]
    """What they see besides the conversation: special tokens, `enable_thinking`."""
    _texts: dict[str, str] = field(default_factory=dict)
    _size: int = 0

    def render(
        self,
        conversations: Sequence[Messages],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> list[str]:
        """The text of each conversation.

        Raises: DataError when the template refuses one; ConfigError when it takes too much time or
        memory, or writes too much.
        """
        keys = [
            json.dumps([list(map(dict, messages)), tools, add_generation_prompt], default=repr)
            for messages in conversations
        ]
        found = {key: self._texts[key] for key in keys if key in self._texts}
        missing = {
            key: messages
            for key, messages in zip(keys, conversations, strict=True)
            if key not in found
        }
        for start in range(0, len(missing), BATCH):
            some = dict(list(missing.items())[start : start + BATCH])
            texts = self._call(list(some.values()), tools, add_generation_prompt)
            found |= zip(some, texts, strict=True)
        self._keep({key: found[key] for key in missing})
        return [found[key] for key in keys]

    def source(self, tools: Tools | None) -> str:
        """The template for a conversation with these tools.

        Raises: ConfigError when there are several and none is for it.
        """
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise ConfigError(
                f"The model has chat templates called {', '.join(self.sources)}, and no default."
            )
        return self.sources[name]

    def _call(
        self, conversations: Sequence[Messages], tools: Tools | None, add_generation_prompt: bool
    ) -> list[str]:
        reply = _worker().call(
            "localrl.policy.template:render",
            {
                "template": self.source(tools),
                "conversations": [list(map(dict, messages)) for messages in conversations],
                "variables": self.variables,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                "limit": TEXT_LIMIT,
            },
        )
        if not reply.ok:
            raise ConfigError(
                f"The model's chat template is refused: rendering it {_told(reply)}. Mend the "
                "template in the model's folder, or use another model."
            )
        if "refused" in reply.value:
            culprit = conversations[len(reply.value["texts"])]
            reason = _plain(reply.value["refused"].rstrip("."))
            raise DataError(
                f"The model's chat template cannot write the conversation {_shown(culprit)}: "
                f"{reason}. Change the task's messages, or use another model."
            )
        return reply.value["texts"]

    def _keep(self, texts: Mapping[str, str]) -> None:
        """Keep the texts, and forget the oldest ones beyond the bound."""
        for key, text in texts.items():
            self._texts[key] = text
            self._size += len(key) + len(text)
        while self._size > KEPT:
            key = next(iter(self._texts))
            self._size -= len(key) + len(self._texts.pop(key))


def thinking_switch(template: Mapping[str, str], wish: str) -> dict[str, bool]:
    """What `model.thinking` adds to a template's variables.

    Raises: ConfigError when thinking is to be switched and the template has no such switch.
    """
    value = THINKING[wish]
    if value is None:
        return {}
    if not any("enable_thinking" in source for source in template.values()):
        raise ConfigError(
            f"model.thinking is {wish!r}, but this model's chat template has no enable_thinking to "
            "switch. Leave it at 'auto'."
        )
    return {"enable_thinking": value}


def _told(reply: Reply) -> str:
    message = _plain(reply.message.rstrip("."))
    return f"failed with {message}" if reply.failure == "raised" else message


def _shown(messages: Messages) -> str:
    listed = [dict(message) for message in messages]
    return _plain(json.dumps(listed, ensure_ascii=False, default=repr))


def _plain(text: str) -> str:
    """The beginning of a text out of a model's folder, without what could drive a terminal."""
    shown = "".join(c if c.isprintable() else "�" for c in text[:SHOWN])
    return shown if len(text) <= SHOWN else f"{shown}..."


@functools.cache
def _worker() -> Worker:
    """The child that renders, started by the first call and ended with this process."""
    worker = Worker(time_limit_s=TIME_LIMIT_S, memory_limit_bytes=MEMORY_LIMIT)
    atexit.register(worker.close)
    return worker
