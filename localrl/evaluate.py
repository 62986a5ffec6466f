"""Evaluation: one completion per held-out prompt, with the same prompts and draws every time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from localrl.records import Example, Leaf, ScoredGroup, mean_or_none
from localrl.rollouts.adaptive import Score
from localrl.rollouts.agents import AgentTurns
from localrl.rollouts.decode import DecodeCounts, Decoder
from localrl.rollouts.groups import ONE, sample_groups
from localrl.rollouts.pace import Pace
from localrl.rollouts.turns import Turns
from localrl.runs.logs import to_json
from localrl.utils.intervals import wilson

EVALUATION_SEED = 0x5EED
"""Fixed seed of evaluations, independent of the run's: they compare policies, not luck."""
SHOWN = 6
"""Number of prompts, the first ones, whose completions are kept for people to read."""


DETAILS = ("prompts", "passed", "shown")
"""Fields of an evaluation that are not numbers of it as a whole."""
GIVEN = ("loss", "demonstrations")
"""Fields that only supervised runs have."""


@dataclass(frozen=True)
class Shown:
    """One held-out prompt with the model's completion, for people to read."""

    prompt: str
    completion: str
    answer: Any
    reward: float | None


@dataclass(frozen=True)
class Evaluation:
    """The performance of a policy on held-out prompts, one completion each."""

    n: int
    """Number of completions judged by the first reward function; its failures are not counted."""
    pass_at_1: float | None
    """Share of them with a reward of 1 or more. Other functions may shape, but do not judge."""
    ci95: tuple[float, float] | None
    """Wilson interval of pass_at_1."""
    mean_reward: float | None
    mean_completion_tokens: float | None
    shown: tuple[Shown, ...]
    temperature: float = 1.0
    """Sampling temperature; 0 means greedy. Checkpoints without this field were made at 1."""
    passed: tuple[bool | None, ...] = ()
    """The verdict on each prompt, in order; None where there is none. Empty in old checkpoints."""
    prompts: str = ""
    """Digest of the prompts and answers: evaluations with the same one can be compared in pairs."""
    loss: float | None = None
    """Mean -log-probability per token of held-out worked examples; None if there are none."""
    demonstrations: int = 0
    """Number of these."""

    def summary(self) -> dict[str, Any]:
        """Return only the numbers, under the names used in `eval.json`."""
        fields = asdict(self)
        for name in (*DETAILS, *(GIVEN if self.loss is None else ())):
            del fields[name]
        fields["pass@1"] = fields.pop("pass_at_1")
        return fields

    def details(self) -> dict[str, Any]:
        """Return the rest: what was asked, which prompts passed, and completions to read."""
        fields = asdict(self)
        more = () if self.loss is None else ("demonstrations",)
        return {name: fields[name] for name in (*DETAILS, *more)}


def judge(
    decoder: Decoder,
    examples: Sequence[Example],
    prompts: Sequence[tuple[int, ...]],
    score: Score,
    *,
    max_completion_tokens: int,
    turns: Turns | AgentTurns | None = None,
) -> list[ScoredGroup]:
    """Return one scored completion of each example, from the decoder's current policy.

    prompts: the examples' token ids. What one example gets does not depend on the others.
    """
    return score(
        sample_groups(
            decoder,
            examples,
            prompts,
            ONE,
            rule=None,
            max_completion_tokens=max_completion_tokens,
            seed=EVALUATION_SEED,
            step=0,
            version=0,
            turns=turns,
        )
    )


def summarise(scored: Sequence[ScoredGroup], *, passing: str, temperature: float) -> Evaluation:
    """Return pass@1 of judged completions.

    A completion passes when the reward function named `passing` gives it 1 or more. Without
    completions nothing is known.
    """
    if not scored:
        return Evaluation(0, None, None, None, None, (), temperature)
    rewards = [group.rewards[0] for group in scored]
    known = [reward for reward in rewards if reward is not None]
    verdicts = [group.parts[passing][0] for group in scored]
    judged = [verdict for verdict in verdicts if verdict is not None]
    passes = tuple(None if verdict is None else verdict >= 1 - 1e-9 for verdict in verdicts)
    passed = passes.count(True)
    return Evaluation(
        n=len(judged),
        pass_at_1=passed / len(judged) if judged else None,
        ci95=wilson(passed, len(judged)) if judged else None,
        mean_reward=mean_or_none(known),
        mean_completion_tokens=mean_or_none([sampled_tokens(group) for group in scored]),
        shown=tuple(_show(group) for group in scored[:SHOWN]),
        temperature=temperature,
        passed=passes,
        prompts=_digest([group.group.example for group in scored]),
    )


def sampled_tokens(scored: ScoredGroup) -> int:
    """Return the number of tokens that the model wrote in a judged completion."""
    return int(scored.group.completion(0).sampled.sum())


def at_temperature(decoder: Decoder, temperature: float) -> Decoder:
    """Copy a decoder with another temperature and its own counts and pace.

    Its completions go on even when their outcome is decided.
    """
    return replace(
        decoder, temperature=temperature, counts=DecodeCounts(), pace=Pace(), decisions=None
    )


def _digest(examples: Sequence[Example]) -> str:
    asked = [[example.messages, example.answer] for example in examples]
    return hashlib.sha256(to_json(asked)).hexdigest()[:16]


def _show(scored: ScoredGroup) -> Shown:
    example = scored.group.example
    return Shown(
        prompt=example.messages[-2 if example.begun else -1]["content"],
        completion=_said(scored.group.leaves[0]),
        answer=example.answer,
        reward=scored.rewards[0],
    )


def _said(leaf: Leaf) -> str:
    """Return the model's text, or the whole conversation."""
    if not leaf.messages:
        return leaf.text
    return " | ".join(f"{message['role']}: {message['content']}" for message in leaf.messages)
