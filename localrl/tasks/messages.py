"""Reads the chat messages of a row as they are, for the chat template and the rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from localrl.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")


def read_conversation(
    place: str, column: str, messages: Sequence[Any]
) -> tuple[Mapping[str, Any], ...]:
    """Read the messages of a prompt; one from the assistant at the end begins the model's turn.

    An empty message of the system is none. Everything else that messages hold is kept.

    Raises: DataError, naming place and column.
    """
    found = [read_message(place, column, message) for message in messages]
    if found[0]["role"] == "system" and not found[0]["content"].strip():
        del found[0]
    roles = [message["role"] for message in found]
    if not roles or roles[-1] == "system":
        raise DataError(f"{place}: there is no message of the user. Add one at the end.")
    if roles[-1] != "assistant":
        return tuple(found)
    begins = found[-1].get("content") and "tool_calls" not in found[-1]
    if roles[-2:-1] not in (["user"], ["tool"]) or not begins:
        raise DataError(
            f"{place}: the last message is the assistant's, and no beginning of a turn that "
            "follows the user's. End with the user's, and put the right answer in `answer`."
        )
    return tuple(found)


def read_message(place: str, column: str, message: Any) -> Mapping[str, Any]:
    """Check a chat message, and return it with its content as text; nothing else is changed.

    Content may be missing where there are `tool_calls` or reasoning, and be empty from a tool or
    the system. Raises: DataError.
    """
    if not isinstance(message, dict) or "role" not in message:
        raise DataError(
            f"{place}: {column} holds {message!r:.60}; a message needs a `role` and a `content`."
        )
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{place}: the role {role!r} is not one of {', '.join(ROLES)}.")
    kept = {name: value for name, value in message.items() if value is not None}
    content = _joined(place, kept.get("content"))
    speaks = role == "assistant" and any(kept.get(name) for name in ("tool_calls", *REASONING))
    if content is None and not speaks:
        raise DataError(
            f"{place}: {column} holds {message!r:.60}; a message needs a `role` and a `content`."
        )
    if content is None:
        return kept
    blank = isinstance(content, str) and not content.strip()
    may_be_empty = blank and (speaks or role in ("system", "tool"))
    return kept | {"content": content if may_be_empty else read_text(place, "content", content)}


def _joined(place: str, content: Any) -> Any:
    """Join a content in parts, if all of them are text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise DataError(
                f"{place}: a content has the part {part!r:.60}. Only parts of text, "
                '{"type": "text", "text": ...}, can be read.'
            )
    return "".join(part["text"] for part in content)


def read_text(place: str, column: str, value: Any) -> str:
    """Return a value that is text and not blank. Raises: DataError, naming place and column."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {column} is {value!r:.60}; it must be text.")
    return value
