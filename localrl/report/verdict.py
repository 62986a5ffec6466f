"""Says in one sentence what happened between two evaluations, in the same words everywhere."""

from __future__ import annotations

from localrl.report.reading import Run, Score
from localrl.utils.intervals import paired_interval
from localrl.utils.text import sampled_at

SMALL = 0.05
"""Gain in pass@1 that counts as none: an interval that ends below it says "not better"."""
BEFORE_AND_AFTER = ("before", "after")


def verdict(run: Run) -> str:
    """Say whether training made the model better: better, worse, not better, or cannot tell."""
    if not run.scores:
        wanted = run.settings.get("task.eval_prompts") != 0
        return "No evaluation yet." if wanted else "No evaluation: task.eval_prompts is 0."
    if len(run.scores) == 1:
        return "One evaluation so far: nothing to compare it with."
    first, last = run.scores[0], run.scores[-1]
    if first.loss is None or last.loss is None:
        return compare(first, last)
    loss = f"Held-out loss {first.loss:.3f} before, {last.loss:.3f} after."
    return f"{compare(first, last)} {loss}" if first.n else loss


def compare(first: Score, second: Score, names: tuple[str, str] = BEFORE_AND_AFTER) -> str:
    """Say whether the second of two evaluations is better, in pairs if both had the same prompts.

    names: of both sides; the first one is also the one that the second is compared with.
    """
    if first.interval is None or second.interval is None:
        return "Cannot tell: an evaluation has no judged completion."
    reason = incomparable(first, second)
    if reason:
        return f"Cannot tell: {reason}."
    rates = f"pass@1 {first.pass_at_1:.3f} {names[0]}, {second.pass_at_1:.3f} {names[1]}"
    better, worse = (
        ("Better", "Worse")
        if names == BEFORE_AND_AFTER
        else (
            f"{names[1]} is better",
            f"{names[0]} is better",
        )
    )
    pairs = _pairs(first, second)
    if not pairs:
        first_span, second_span = first.interval, second.interval
        if second_span[0] > first_span[1]:
            return f"{better}: {rates}; the 95 % intervals do not overlap."
        if second_span[1] < first_span[0]:
            return f"{worse}: {rates}; the 95 % intervals do not overlap."
        if names == BEFORE_AND_AFTER and second_span[1] < first_span[0] + SMALL:
            return f"Not better: {rates}; a gain of {SMALL:g} or more is ruled out."
        return (
            f"Cannot tell: {rates}; the 95 % intervals overlap. More held-out prompts would tell."
        )
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    low, high = paired_interval(lost, won, len(pairs))
    found = f"{rates} on the same {len(pairs)} prompts, difference {low:+.3f} to {high:+.3f} (95 %)"
    counts = f"{won} solved only {names[1]}, {lost} only {names[0]}"
    if low > 0:
        return f"{better}: {found}; {counts}."
    if high < 0:
        return f"{worse}: {found}; {counts}."
    if names == BEFORE_AND_AFTER and high < SMALL:
        return f"Not better: {found}, so a gain of {SMALL:g} or more is ruled out; {counts}."
    return f"Cannot tell: {found}, which includes 0; {counts}. More held-out prompts would tell."


def incomparable(first: Score, second: Score) -> str:
    """Return why two evaluations cannot be compared at all; empty if they can."""
    drawn = [sampled_at(score.temperature) for score in (first, second)]
    if drawn[0] != drawn[1]:
        return f"they were sampled differently ({drawn[0]}, {drawn[1]})"
    if first.prompts and second.prompts:
        sizes = [len(first.passed), len(second.passed)]
    else:
        sizes = [first.n, second.n]
    if sizes[0] != sizes[1]:
        return f"they are of different size ({sizes[0]} and {sizes[1]} prompts)"
    if first.prompts != second.prompts and first.prompts and second.prompts:
        return "they asked different prompts"
    return ""


def _pairs(first: Score, second: Score) -> list[tuple[bool, bool]]:
    """Return both verdicts on each prompt that has both; empty if the prompts may differ."""
    if not first.prompts or first.prompts != second.prompts:
        return []
    both = zip(first.passed, second.passed, strict=True)
    return [(bool(a), bool(b)) for a, b in both if a is not None and b is not None]
