"""Checks of a task's rewards that cost nothing: on gold answers, before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localrl.errors import ConfigError, RewardError
from localrl.policy.tokenizer import Tokenizer
from localrl.records import Example, RewardSpec, ScoredGroup
from localrl.rewards.scoring import Scorer
from localrl.tasks.base import Task
from localrl.tasks.gold import score_gold
from localrl.tasks.rows import ANSWERS

BUDGET_S = 0.5
"""Seconds for scoring gold answers; slow rewards are called once or twice."""
SOME = 64
"""Number of examples that represent an endless task."""
COMPARES = (
    "localrl.rewards.accuracy:accuracy_reward",
    "localrl.rewards.accuracy:choice_reward",
    "localrl.rewards.answers:final_answer",
    "localrl.rewards.latex:math_verify_reward",
)
"""Built-in rewards that compare a completion with the gold answer, and want no more of it."""
NEEDS = (
    *COMPARES,
    "localrl.rewards.accuracy:reasoning_accuracy_reward",
    "localrl.rewards.shaping:get_cosine_scaled_reward",
)
"""Built-in rewards that say nothing of a completion if there is no gold answer."""


def check_columns(task: Task, held_out: Sequence[Example], scorer: Scorer) -> None:
    """Check that the rewards can be loaded, and that examples have the columns they require.

    Raises: ConfigError or DataError if not; see `Scorer.check`.
    """
    training = [task.train(i) for i in range(task.train_size or 1)]
    for examples in filter(None, (training, held_out)):
        scorer.check({name for example in examples for name in example.columns})


def check_rewards(
    task: Task,
    scorer: Scorer,
    tokenizer: Tokenizer,
    warn: Callable[[str], None],
    *,
    gold: bool,
) -> None:
    """Check what the rewards make of gold answers, and warn of what will teach nothing.

    Gold answers are scored as completions; built-in tasks with their own rewards are not.

    scorer: one whose counts are not the run's. gold: True if an answer by itself is a correct
    completion, as in the user's own data.

    Raises: ConfigError if no example has a gold answer that a built-in reward can read;
    RewardError if a reward fails on every gold answer.
    """
    examples = [task.train(i) for i in range(task.train_size or SOME)]
    if not gold and all(spec.target.startswith("localrl.") for spec in task.rewards):
        return
    answered = [example for example in examples if example.answer is not None]
    for spec in task.rewards:
        if gold and spec.target.startswith(NEEDS) and len(answered) < len(examples):
            _check_answers(task, spec, examples, len(answered), warn)
    try:
        scored = score_gold(
            answered or examples, scorer.score, tokenizer, task.rewards, budget_s=BUDGET_S
        )
    except RewardError:
        if answered:
            raise
        return  # only on empty completions, and the scorer has told of it
    if gold and answered:
        _check_readable(task, scored)
    _warn_of_none(task, scored, "gold answers" if answered else "empty completions", warn)
    if gold and answered:
        _check_gold(task.rewards[0], scored, warn)


def _check_answers(
    task: Task,
    spec: RewardSpec,
    examples: Sequence[Example],
    answered: int,
    warn: Callable[[str], None],
) -> None:
    if not answered:
        columns = dict.fromkeys(name for example in examples for name in example.columns)
        raise ConfigError(
            f"The reward {spec.name!r} compares with gold answers, and no row of {task.name} has "
            f"one ({', '.join(ANSWERS)}). Its other columns: {', '.join(columns) or 'none'}. If "
            "one of them is the answer, name it with --columns answer=COLUMN; else choose another "
            "--reward."
        )
    warn(
        f"{len(examples) - answered} of {len(examples)} rows have no gold answer: {spec.name} "
        "gives no reward for them, so they teach nothing"
    )


def _check_readable(task: Task, scored: Sequence[ScoredGroup]) -> None:
    for spec in task.rewards:
        compares = spec.target.startswith((*NEEDS, "localrl.rewards.json_answers:json_reward"))
        if compares and all(group.parts[spec.name][0] is None for group in scored):
            example = scored[0].group.example
            raise ConfigError(
                f"The reward {spec.name!r} can read none of {len(scored)} gold answers of "
                f"{task.name}; the first is {example.answer!r:.60} of {example.id}. Write texts, "
                "numbers or lists of accepted answers, name another column with --columns "
                "answer=COLUMN, or choose another --reward."
            )


def _warn_of_none(
    task: Task, scored: Sequence[ScoredGroup], tried: str, warn: Callable[[str], None]
) -> None:
    for spec in task.rewards:
        if all(group.parts[spec.name][0] is None for group in scored):
            warn(
                f"the reward {spec.name!r} is None, no reward, for all of {len(scored)} {tried}. A "
                "run in which no completion gets any reward ends after 3 steps"
            )


def _check_gold(
    judge: RewardSpec, scored: Sequence[ScoredGroup], warn: Callable[[str], None]
) -> None:
    """Warn if gold answers do not get 1 from the reward that decides what is correct."""
    if judge.target.startswith("localrl.") and not judge.target.startswith(COMPARES):
        return
    wrong = [group for group in scored if (group.parts[judge.name][0] or 0.0) < 1 - 1e-9]
    values = {group.parts[judge.name][0] for group in wrong}
    if not wrong or values == {None}:
        return
    example, value = wrong[0].group.example, wrong[0].parts[judge.name][0]
    shown = f"{example.answer!r:.40} of {example.id} gets {value}"
    if len(wrong) == len(scored):
        warn(
            f"none of {len(scored)} gold answers gets 1 from {judge.name} ({shown}). Is that "
            "right? It is if a whole completion has to say more than the answer"
        )
    else:
        warn(
            f"{len(wrong)} of {len(scored)} gold answers do not get 1 from {judge.name} ({shown}). "
            "Look at them with localrl tasks check"
        )
