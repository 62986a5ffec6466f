"""Reads from what a template renders where a prompt begins, where a turn ends, and what is between.

Pure functions of rendered texts and of a tokenizer's own encoding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from typing import Any

from localrl.errors import ConfigError

ASKED, STAND_IN = "question", "stand-in"
"""Placeholders for the turns of a conversation that the template renders."""
EXCHANGE = ({"role": "user", "content": ASKED}, {"role": "assistant", "content": STAND_IN})
THINKS, THINKS_END = "<think>", "</think>"


def continued(before: str, whole: str, begun: str) -> str:
    """Return the text of a prompt whose last message is the beginning of the model's turn.

    before: the prompt without that message, up to the model's turn. whole: with that message as a
    whole turn. As in transformers the text is `whole` up to the end of the message. A template that
    writes more before it in whole turns, such as an empty block of thoughts, would put that into
    the model's mouth: the message then follows `before`.
    """
    start, said = before.rstrip(), begun.strip()
    rest = whole[len(start) :]
    if whole.startswith(start) and rest.lstrip().startswith(said):
        at = len(whole) - len(rest.lstrip())
        return whole[: at + len(begun.lstrip() if whole[at:].startswith(begun.lstrip()) else said)]
    if start.endswith(THINKS) and said.startswith(THINKS):
        begun = begun.lstrip().removeprefix(THINKS).lstrip("\n")
    return before + begun


def begins_with(inner: Any) -> tuple[int, ...]:
    """Return the tokens that the tokenizer puts before a text, such as the beginning of sequence.

    What it would put after one is left out, since the model continues the text.
    """
    plain = inner.encode("a", add_special_tokens=False)
    whole = inner.encode("a")
    count = len(whole) - len(plain)
    starts = [at for at in range(count + 1) if plain and whole[at : at + len(plain)] == plain]
    return tuple(whole[: starts[0]]) if starts else ()


def end_of_turn(last: str, middle: str, inner: Any, named: Collection[int]) -> int | None:
    """Return the token that ends the model's turn, as the chat template writes it.

    last: a rendered `EXCHANGE`. middle: one that goes on with another question. inner: the
    tokenizer. named: tokens known to end a turn; one of them is preferred.

    None if the template ends a turn with plain text or with nothing.
    """

    def encode(part: str) -> list[int]:
        return inner.encode(part, add_special_tokens=False)

    ids, others = (
        encode(text.rpartition(STAND_IN)[2].lstrip()) if STAND_IN in text else []
        for text in (last, middle)
    )
    # What follows only the last turn ends the text, or begins the model's next turn.
    pairs = zip(ids, others or ids, strict=False)
    ending = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    known = [token for token in ending if token in named]
    added = [token for token in ending[:1] if token in inner.added_tokens_decoder]
    return next(iter([*known, *added]), None)


def named_ends(inner: Any, texts: Sequence[str]) -> Iterator[int]:
    """Yield the tokens that `model.end_tokens` names. Raises: ConfigError."""
    for text in texts:
        ids = inner.encode(text, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == inner.unk_token_id:
            raise ConfigError(
                f"model.end_tokens has {text!r}, which is not one token of this model. A text that "
                "ends completions is named with rollout.stop_text."
            )
        yield ids[0]
