"""Recognises prompts that are in a chat template's format already, and would get it twice."""

from __future__ import annotations

import re
from collections.abc import Sequence

from localrl.errors import DataError
from localrl.policy.prompt_format import ASKED, EXCHANGE
from localrl.policy.tokenizer import Tokenizer
from localrl.records import Example

FOREIGN = (
    "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|start|>", "[INST]", "<|user|>",
    "<|assistant|>", "<｜User｜>", "<|turn>", "<|START_OF_TURN_TOKEN|>", "### Instruction:",  # noqa: RUF001
)  # fmt: skip
"""Beginnings of turns in the formats of widespread models."""
SHORTEST = 4
"""Minimum number of characters of a plain text that counts as the beginning of a turn."""


def turn_marks(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return texts that a prompt in the format of a chat template contains.

    They are the special tokens of this model's template, the text that it begins the user's turn
    with, and what widespread templates begin turns with; none if the model's is not used.
    """
    if tokenizer.joins:
        return ()
    try:
        text = tokenizer.render(EXCHANGE)
    except DataError:
        return FOREIGN
    added = tokenizer.inner.added_tokens_decoder.values()
    special = [token.content for token in added if token.special and token.content in text]
    opening = text.partition(ASKED)[0].strip().rpartition("\n")[2]
    plain = [opening] if len(opening) >= SHORTEST and not opening.isalnum() else []
    return tuple(dict.fromkeys(mark for mark in (*special, *plain, *FOREIGN) if len(mark) > 1))


def find_templated(examples: Sequence[Example], tokenizer: Tokenizer) -> list[tuple[Example, str]]:
    """Return the examples whose prompts are in a template's format, each with what shows it."""
    marks = turn_marks(tokenizer)
    if not marks:
        return []
    search = re.compile("|".join(map(re.escape, marks))).search
    found = []
    for example in examples:
        contents = (str(message.get("content", "")) for message in example.messages)
        match = next(filter(None, map(search, contents)), None)
        if match:
            found.append((example, match.group()))
    return found
