"""Completions that end when their outcome is decided, and rules that tell so from a prefix.

Where the reward is a function of the tokens up to the decision at tau, a stopping time, the rest
of a completion adds nothing to the expected gradient:

    E[(R - b) sum over t > tau of grad log p(y_t | y_<t)] = 0,   R and b known at tau

so ending it there leaves the gradient unbiased and takes away the noise of those tokens. That holds
for coefficients that do not depend on the length (`constant`, the default, whose Z is a number
planned before). With `sequence` (GRPO's 1 / |y|) the tokens of completions that end early, mostly
wrong ones, weigh more than before; with `group` and `step` (DAPO) the divisor shrinks, and all
tokens weigh more. Leave-one-out baselines and the tracker see rewards alone and are the same; the
tracker expects shorter completions.

A rule that ends a completion which could still have been rewarded makes the reward stricter: the
gradient is unbiased for the reward of the completions as they were ended. `work` and `first_object`
are such rules, `bare_object` is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache

from localrl.records import Example, Group
from localrl.rollouts.decided import Decisions
from localrl.training.session import Session

Decides = Callable[[str, Example], bool]
"""Returns True if a completion that begins with this text need not go on."""


def ending_early(session: Session) -> Session:
    """Let completions of training end as the task's rule says; those of evaluations do not."""
    decides, tokenizer = rule(session), session.policy.tokenizer

    def decide(groups: Sequence[Group]) -> list[bool]:
        return [decides(group.leaves[0].text, group.example) for group in groups]

    session.sampler.decoder.decisions = Decisions(decide, tokenizer)
    return session


# Rules


def work(text: str, example: Example) -> bool:
    """Decide `steps`: a wrong item of the working or a wrong character of the answer loses.

    Only what an item says after its sign is compared, so guesses may be right. The reward looks at
    the answer alone: this is stricter where a later mistake would have undone the first one.
    """
    rights, answer = _items(example)
    working, marker, stated = text.partition("#")
    if marker:
        return not answer.startswith(stated)
    *whole, last = working.split(";")
    if len(whole) > len(rights) or (last and len(whole) == len(rights)):
        return True
    if any(_said(item) != right for item, right in zip(whole, rights, strict=False)):
        return True
    if len(whole) == len(rights) or (whole and not {*"=>"} & {*last}):
        return False
    return not rights[len(whole)].startswith(_said(last))


def _said(item: str) -> str:
    """What an item of the working states: the text after its sign, or all of the first one."""
    return item.replace(">", "=").rpartition("=")[2]


@cache
def _rights(family: str, operands: tuple[str, ...]) -> tuple[str, ...]:
    if family == "sorting":
        [letters] = operands
        return (letters, *sorted(letters)[:-1])
    totals = [sum(map(int, operands[: n + 1])) for n in range(len(operands))]
    return tuple(f"{total:03d}"[::-1] for total in totals)


def _items(example: Example) -> tuple[tuple[str, ...], str]:
    """Return what the items of a right working state, in order, and the answer."""
    operands = tuple(example.messages[-1]["content"].split()[1:])
    return _rights(str(example.columns["family"]), operands), str(example.answer)


def first_object(text: str, example: Example) -> bool:
    """Decide `extraction`: the first whole JSON object ends a completion, right or wrong.

    The built-in reward takes the last object, so a second one could have been right.
    """
    return _object_end(text) is not None


def bare_object(text: str, example: Example) -> bool:
    """Decide the reward for an object and nothing else: anything before or after it loses."""
    begun = text.lstrip()
    end = _object_end(text)
    return (begun[:1] not in ("", "{")) or (end is not None and bool(text[end:].strip()))


def _object_end(text: str) -> int | None:
    """Return where the first object of a text ends; None if it has not."""
    start = text.find("{")
    try:
        return json.JSONDecoder().raw_decode(text, start)[1] if start >= 0 else None
    except ValueError:
        return None


def rule(session: Session) -> Decides:
    """Return the rule of the session's task and reward."""
    if session.config.task.name in ("steps", "sums", "sorting"):
        return work
    strict = [spec.name for spec in session.task.rewards] == ["facts"]
    return bare_object if strict else first_object
