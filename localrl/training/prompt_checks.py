"""Checks every prompt before a run: what only template and tokenizer can tell of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localrl.errors import ConfigError, DataError
from localrl.policy.templated import find_templated
from localrl.policy.tokenizer import Tokenizer
from localrl.records import Example
from localrl.tasks.rows import LISTED, tell_bad

BATCH = 1024
"""Number of prompts encoded at once."""
TRIED = 16
"""Maximum number of prompts whose unknown characters are looked for one by one."""


def check_prompts(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    name: str,
    beat: Callable[[], None] = lambda: None,
) -> list[int]:
    """Return the number of tokens of each prompt.

    name: the task's, for messages. beat: called before each batch.

    Raises: DataError, naming the rows, if prompts cannot be rendered or encoded; ConfigError if
    they have characters that the model has no token for.
    """
    lengths: list[int] = []
    bad: list[tuple[str, str]] = []
    unread: list[Example] = []
    unknown = tokenizer.unknown_id
    for start in range(0, len(examples), BATCH):
        beat()
        batch = examples[start : start + BATCH]
        for example, ids in zip(batch, tokenizer.attempt_prompts(batch), strict=True):
            if isinstance(ids, DataError) or not ids:
                place = example.place or example.id
                empty = f"{place}: The prompt has no tokens."
                bad.append((place, str(ids) if isinstance(ids, DataError) else empty))
                continue
            lengths.append(len(ids))
            if unknown in ids:
                unread.append(example)
    if bad:
        raise DataError(tell_bad(bad, len(examples)))
    _check_vocabulary(unread, len(examples), tokenizer, name)
    return lengths


def warn_of_prompts(
    examples: Sequence[Example], tokenizer: Tokenizer, warn: Callable[[str], None]
) -> None:
    """Warn of prompts, as the task's rows have them, that are probably not what they should be."""
    _warn_of_templated(examples, tokenizer, warn)
    _warn_of_begun(examples, warn)
    _warn_of_tools(examples, tokenizer, warn)


def tell_overlong(long: Sequence[tuple[Example, int]], total: int, most: int) -> str:
    """Describe prompts that are too long, given with their lengths, of `total` prompts."""
    (first, length), others = long[0], long[1 : LISTED + 1]
    told = f"The prompt of {_named(first)} has {length} tokens; 1 to {most} are allowed."
    if others:
        listed = ", ".join(f"{_named(example)} ({length})" for example, length in others)
        more = f" and {len(long) - 1 - LISTED} more" if len(long) > LISTED + 1 else ""
        told += f" {len(long)} of {total} are too long; the others: {listed}{more}."
    return (
        f"{told} Raise rollout.max_prompt_tokens to {max(length for _, length in long)}, or leave "
        "such rows out with task.filter_overlong_prompts=true."
    )


def _check_vocabulary(
    unread: Sequence[Example], total: int, tokenizer: Tokenizer, name: str
) -> None:
    some = unread[:TRIED]
    characters = dict.fromkeys(c for e in some for c in tokenizer.unknown(e.messages))
    if characters:
        raise ConfigError(
            f"The model has no token for {''.join(characters)!r}, which {len(unread)} of {total} "
            f"prompts of {name!r} contain; the first is {_named(unread[0])}. Choose another model "
            "with --model; the embedded one can read the tasks steps, sums and sorting."
        )


def _warn_of_templated(
    examples: Sequence[Example], tokenizer: Tokenizer, warn: Callable[[str], None]
) -> None:
    found = find_templated(examples, tokenizer)
    if found:
        example, mark = found[0]
        warn(
            f"{len(found)} of {len(examples)} prompts contain {mark!r}, as if they were in a chat "
            f"template's format already; the first is {_named(example)}. They get this model's "
            "template around that: take the format out of the data, or give prompts as they are "
            "with model.chat_template=off"
        )


def _warn_of_begun(examples: Sequence[Example], warn: Callable[[str], None]) -> None:
    begun = [example for example in examples if example.begun]
    if begun:
        warn(
            f"{len(begun)} of {len(examples)} prompts end in a message of the assistant, which the "
            f"model continues; the first is {_named(begun[0])}. If it is the right answer, move it "
            "to the column answer"
        )


def _warn_of_tools(
    examples: Sequence[Example], tokenizer: Tokenizer, warn: Callable[[str], None]
) -> None:
    """Warn if the template leaves out the tools of rows."""
    having = [example for example in examples if example.tools]
    if not having:
        return
    first = having[0]
    if tokenizer.render(first.messages, tools=first.tools) == tokenizer.render(first.messages):
        warn(
            f"{len(having)} of {len(examples)} rows have tools, and this model's chat template "
            f"shows none; the first is {_named(first)}. Choose a model made for tools, or leave "
            "the column out with --columns tools="
        )


def _named(example: Example) -> str:
    return f"{example.id} ({example.place})" if example.place else example.id
