"""Reads from what a template renders where a prompt begins, where a turn ends, and what is between.

Pure functions of rendered texts and of a tokenizer's own encoding.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from typing import Any

from localrl.errors import ConfigError

ASKED, STAND_IN = "36015", "940275"
"""Placeholders for the turns of a conversation that the template renders: digits, because templates
may change letters."""
EXCHANGE = ({"role": "user", "content": ASKED}, {"role": "assistant", "content": STAND_IN})
SYSTEM = {"role": "system", "content": "0"}
"""Message before an exchange, for templates that demand one of the system."""
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

    Either text is empty if the template refuses it. None if the template ends a turn with plain
    text or with nothing.
    """

    def encode(part: str) -> list[int]:
        return inner.encode(part, add_special_tokens=False)

    ids, others = (encode(after_turn(text).lstrip()) for text in (last, middle))
    if ids:
        # What follows only the last turn ends the text, or begins the model's next turn.
        ending = _shared(ids, others or ids)
    else:
        # The next question's turn begins as the first one does.
        between = encode(after_turn(middle).partition(ASKED)[0].lstrip())
        opening = _shared(between[::-1], encode(middle.partition(ASKED)[0])[::-1])
        ending = between[: len(between) - len(opening)]
    known = [token for token in ending if token in named]
    added = [token for token in ending[:1] if token in added_tokens(inner)]
    return next(iter([*known, *added]), None)


def after_turn(text: str) -> str:
    """Return what a rendered conversation has after the model's turn; nothing if it lacks that."""
    return text.rpartition(STAND_IN)[2] if STAND_IN in text else ""


def _shared(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Return the tokens with which both begin."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [token for token, _ in pairs]


def added_tokens(inner: Any, *, special: bool = False) -> dict[int, str]:
    """Return the tokens beside a tokenizer's vocabulary, by id; only special ones if asked for."""
    try:
        added = inner.added_tokens_decoder
    except (AttributeError, NotImplementedError):  # one of transformers' backends has no such list
        return dict(zip(inner.all_special_ids, inner.all_special_tokens, strict=True))
    return {id: token.content for id, token in added.items() if token.special or not special}


def backend(inner: Any) -> Any:
    """Return the tokenizer of the `tokenizers` library that reads the text, if there is one."""
    return getattr(getattr(inner, "_tokenizer", None), "backend_tokenizer", None)


def unknown_token(inner: Any) -> int | None:
    """Return the token that stands for unknown characters, as transformers or tokenizer.json has
    it; None if neither names one."""
    own = backend(inner)
    if inner.unk_token_id is not None or own is None:
        return inner.unk_token_id
    name = getattr(own.model, "unk_token", None)
    if name is not None:
        return own.token_to_id(name)
    if type(own.model).__name__ == "Unigram":  # names it by its id, which no attribute has
        return json.loads(own.model.__getstate__())["unk_id"]
    return None


def named_ends(inner: Any, texts: Sequence[str], unknown: int | None) -> Iterator[int]:
    """Yield the tokens that `model.end_tokens` names.

    unknown: the token that stands for unknown characters.

    Raises: ConfigError.
    """
    for text in texts:
        ids = inner.encode(text, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == unknown:
            raise ConfigError(
                f"model.end_tokens has {text!r}, which is not one token of this model. A text that "
                "ends completions is named with rollout.stop_text."
            )
        yield ids[0]
