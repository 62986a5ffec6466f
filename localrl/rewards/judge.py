"""Rewards that ask another model: a score of each completion, or a ranking of each group.

They run in the reward process. Any OpenAI-compatible server answers, by default Ollama or LM Studio
on this machine. A request without a readable verdict is no reward; the reason stands in place of
the number, which counts as a failure.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from localrl.rewards.answers import Completion
from localrl.rewards.chat_client import NoAnswer
from localrl.rewards.judge_prompts import RANK, SCORE, Row, columns_of, fill, read_template, rows_of
from localrl.rewards.judging import Answer, Judge, digest
from localrl.rewards.verdicts import Unreadable, ask_ranking, read_ranking, read_scale

LOGGED = 4000
"""Most characters of a judge's text that are logged."""
HOOK = "log_extra"

Values = list[float | str | None]
Reward = Callable[..., Values]


def get_judge_reward(
    *,
    url: str | None = None,
    model: str | None = None,
    prompt: str | None = None,
    scale: str = "0-10",
    max_tokens: int = 1024,
    timeout_s: float = 120.0,
    parallel: int = 4,
    name: str = "judge",
) -> Reward:
    """Make a reward that asks a model to score each completion.

    url, model, max_tokens, timeout_s, parallel: see `Judge`.
    prompt: a template, or a file with one, with places such as {prompt}, {completion} and columns
        of the data. A completion whose example lacks one of them gets None.
    scale: `0-10` for a number, which becomes 0 to 1, or choices with rewards: `yes=1, no=0`.
    name: the column under which the judge's texts are logged.

    Raises: ValueError for a setting that cannot work. Nothing is contacted.
    """
    judge = Judge(url, model, max_tokens, timeout_s, parallel)
    verdicts = read_scale(scale)
    template = read_template(prompt, "completion")

    def judge_reward(
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        log_extra: Callable[[str, Any], None] | None = None,
        **columns: Any,
    ) -> Values:
        filled = [fill(template, SCORE, row) for row in rows_of(prompts, completions, columns)]
        answers = judge.ask([text and f"{text}\n{verdicts.ask}" for text in filled])
        _log(log_extra, name, answers)
        return [_verdict(answer, verdicts.read) for answer in answers]

    return _declare(judge_reward, template)


def get_judge_rank_reward(
    *,
    url: str | None = None,
    model: str | None = None,
    prompt: str | None = None,
    max_tokens: int = 1024,
    timeout_s: float = 120.0,
    parallel: int = 4,
    name: str = "judge_rank",
) -> Reward:
    """Make a reward that asks a model to rank the different completions of each prompt.

    Each gets the share of the others that it beats, a tie counting half. Their order in the
    question is random, but fixed by what they say. A completion without others gets None; if all
    are the same text, the judge is not asked and each gets 0.5.

    Settings are those of `get_judge_reward`; a template has the place {completions}.

    Raises: ValueError for a setting that cannot work. Nothing is contacted.
    """
    judge = Judge(url, model, max_tokens, timeout_s, parallel)
    template = read_template(prompt, "completions")

    def judge_rank_reward(
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        log_extra: Callable[[str, Any], None] | None = None,
        **columns: Any,
    ) -> Values:
        rows = rows_of(prompts, completions, columns)
        groups = [_Ranked.of(list(group), template) for _, group in groupby(rows, _shared)]
        answers = judge.ask([group.question for group in groups])
        pairs = list(zip(groups, answers, strict=True))
        _log(log_extra, name, [answer for group, answer in pairs for _ in group.rows])
        return [value for group, answer in pairs for value in group.rewards(answer)]

    return _declare(judge_rank_reward, template)


@dataclass(frozen=True)
class _Ranked:
    """The completions of one prompt, and the question about them."""

    rows: Sequence[Row]
    order: Sequence[str]
    """The different completions in the order of the question."""
    question: str | None
    """None if there is nothing to ask."""

    @classmethod
    def of(cls, rows: Sequence[Row], template: str | None) -> _Ranked:
        order = sorted({row["completion"] for row in rows})
        random.Random(digest(order)).shuffle(order)
        shown = (f"Answer {number}:\n{text}" for number, text in enumerate(order, start=1))
        text = fill(template, RANK, {**rows[0], "completions": "\n\n".join(shown)})
        asks = text is not None and len(order) > 1
        return cls(rows, order, f"{text}\n{ask_ranking(len(order))}" if asks else None)

    def rewards(self, answer: Answer) -> Values:
        if self.question is None:
            alike = len(self.order) == 1 and len(self.rows) > 1
            return [0.5 if alike else None] * len(self.rows)
        ranking = _verdict(answer, lambda text: read_ranking(text, len(self.order)))
        if isinstance(ranking, str):
            return [ranking] * len(self.rows)
        return [ranking[self.order.index(row["completion"])] for row in self.rows]


def _shared(row: Row) -> str:
    """Return a key that the completions of one prompt share."""
    return digest({name: value for name, value in row.items() if name != "completion"})


def _verdict(answer: Answer, read: Callable[[str], Any]) -> Any:
    """Return what the reader makes of an answer, or the reason why there is no verdict."""
    if answer is None:
        return None
    if isinstance(answer, NoAnswer):
        return f"the judge gave no answer: {answer}"
    try:
        return read(answer)
    except Unreadable as error:
        return f"the judge gave no verdict: {error}"


def _log(log: Callable[[str, Any], None] | None, name: str, answers: Sequence[Answer]) -> None:
    if log is not None:
        log(name, [None if answer is None else str(answer)[:LOGGED] for answer in answers])


def _declare(reward: Reward, template: str | None) -> Reward:
    """Let the function name the columns that its template does: only these are sent to it, and one
    that the data do not have is found before the run."""
    kind = inspect.Parameter.KEYWORD_ONLY
    needed = [inspect.Parameter(n, kind) for n in ("prompts", "completions", *columns_of(template))]
    optional = [inspect.Parameter(n, kind, default=None) for n in ("answer", HOOK)]
    reward.__signature__ = inspect.Signature([*needed, *optional])  # type: ignore[attr-defined]
    return reward
