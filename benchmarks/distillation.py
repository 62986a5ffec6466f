"""Self-distillation from a verified answer, as a stage that `with_distillation` hands to a session.

The policy samples y for a prompt x. The same model, with the right answer in its context, is the
teacher: one more forward pass scores the same tokens behind x and the answer, and each token gets

    d_t = log p(y_t | x, answer, y_<t) - log p(y_t | x, y_<t)

as an advantage, whatever its reward. On tokens sampled from p(. | x) the mean of d_t at a prefix is
minus the KL of policy to teacher there, so that the gradients are, with the teacher q a constant:

| credit | of token t | its mean is the gradient of |
|---|---|---|
| immediate | d_t | - sum over prefixes s of sg[p(s)] KL(p(. given s), q(. given s)) |
| to go | d_t + d_t+1 + ... | - KL(p(y given x), q(y given x)), of whole completions |

sg is stop-gradient. "Immediate" is what on-policy distillation uses; as a gradient of the KL of
whole completions it is biased, because it leaves out that a token decides which prefixes follow.
"To go" is unbiased and has more variance. Neither is a gradient of the expected reward. A clip of
d_t, and the sum with the reward's advantage, are biases against both and are off unless named.

Papers: OPSD, Zhao et al. 2026 (2601.18734), and SDPO, Hübotter et al. 2026 (2601.20802), compare
whole distributions at each token, OPSD with the initial model as the teacher; SRPO, Li et al. 2026
(2604.02288), distils only completions that failed, and gives the others their reward's advantage.
These stages need the sampled tokens alone. They work in one process, with flat groups in float32.

How the answer is told decides what is learned. As a hint, a text behind the question, it makes a
small model a poor teacher. The embedded one cannot read it, and alone this takes it from 0.33 to
0.25 in 4,500 tokens of `steps` (five seeds); added to pairs it changes nothing (0.63 and 0.64).
SmolLM2-135M reads it, but then writes the right object in the wrong form: on `facts` the hint alone
takes it to 0 within 3,000 tokens, and so does 0.3 of it with the reward; 0.1 with the reward is
better than the reward alone. Shown as an earlier turn, with the answer as the model's own reply and
the same question again, the answer has the right form, and needs no reward.

Also tried with the shown answer on `facts`, on two seeds where it needs 5,000 and 4,400 tokens to
0.5 itself, and not kept: an update for every 8 completions instead of 16 (3,700, and 11,000 after
lying at 0 until 6,200), the reward's advantage added (5,700 and 4,700), only failures distilled and
the others left to their reward's advantage (4,600 and 4,700, and then higher: 0.73 and 0.59 after
6,300), and the initial model as the teacher, as in OPSD (4,900 and 4,900). `taught` learns tokens
that the teacher draws instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from rivals import instead

from localrl.learning.credit import Credit
from localrl.learning.selection import Selection
from localrl.records import Batch, Example, Group, ScoredGroup
from localrl.training.session import Session

HINT = "\n\nThe right answer is: {answer}\nRepeat it in the form that was asked for."


@dataclass(frozen=True)
class Rule:
    """How a token's advantage is made of d_t and its completion's advantage from rewards."""

    credit: Literal["immediate", "to go"] = "immediate"
    reward: bool = False
    """True if the reward's advantage is added."""
    failed: bool = False
    """True if only completions without the full reward are distilled; the others have the reward's
    advantage alone."""
    weight: float = 1.0
    """Factor on d_t."""
    clip: float | None = None
    """Largest |d_t|; None: as it is."""
    shown: bool = False
    """True if the answer is shown as an earlier turn; False: it is a hint."""

    def advantages(
        self, gaps: np.ndarray, advantage: float | None, reward: float | None
    ) -> np.ndarray:
        """Return the advantages (n,) of a completion's tokens from its d_t (n,)."""
        if self.clip is not None:
            gaps = np.clip(gaps, -self.clip, self.clip)
        if self.credit == "to go":
            gaps = np.cumsum(gaps[::-1])[::-1]
        if self.failed and reward is not None and reward >= 1:
            gaps = np.zeros_like(gaps)
        return self.weight * gaps + (advantage or 0.0 if self.reward else 0.0)


RULES = {
    "distillation": Rule(),
    "distillation to go": Rule(credit="to go"),
    "distillation clipped": Rule(clip=1.0),
    "distillation and reward": Rule(reward=True, weight=0.1),
    "distillation of failures": Rule(reward=True, failed=True, weight=0.1),
    "shown answer": Rule(shown=True),
}


def with_distillation(session: Session, name: str) -> Session:
    """Return the session with the rule of this name."""
    return replace(instead(Distilling, session), rule=RULES[name], hint=HINT)


@dataclass(eq=False)
class Distilling(Session):
    """A session whose tokens get their advantages from the model that knows the answer."""

    rule: Rule = Rule()
    hint: str = ""
    """Text behind the user's last message; `{answer}` stands for the right one."""

    def select(
        self, step: int, scored: Sequence[ScoredGroup], credits: Sequence[Credit]
    ) -> Selection:
        """Return the batch of a step, with an advantage for each token."""
        # With an advantage of 1 everywhere, the coefficients are the shares.
        shares = [replace(each, advantages=(1.0,) * len(each.advantages)) for each in credits]
        selection = super().select(step, scored, shares)
        chosen = zip(scored, credits, selection.kept, strict=True)
        used = [(group, credit) for group, credit, kept in chosen if kept]
        gaps = self.gaps([group.group for group, _ in used])
        advantages = [
            self.rule.advantages(*each)
            for (group, credit), found in zip(used, gaps, strict=True)
            for each in zip(found, credit.advantages, group.rewards, strict=True)
        ]
        return replace(selection, batch=multiplied(selection.batch, advantages))

    def gaps(self, groups: Sequence[Group]) -> list[list[np.ndarray]]:
        """Return d_t (n,) of every completion of every group."""
        examples = [group.example for group in groups]
        told = [with_turn(e) if self.rule.shown else with_hint(e, self.hint) for e in examples]
        prompts = self.policy.tokenizer.encode_prompts(told)
        behind = [replace(g, prompt_ids=p) for g, p in zip(groups, prompts, strict=True)]
        known = self.sampler.rescore(behind, self.plan)
        return [
            [taught - node.sampled_logprobs for taught, node in zip(one, group.nodes, strict=True)]
            for one, group in zip(known, groups, strict=True)
        ]


def with_hint(example: Example, hint: str) -> Example:
    """Return the example with its answer behind the last message of the user."""
    messages = list(example.messages)
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    told = messages[last]["content"] + hint.format(answer=example.answer)
    messages[last] = {**messages[last], "content": told}
    return replace(example, messages=tuple(messages))


def with_turn(example: Example) -> Example:
    """Return the example after a turn with the same question and its answer."""
    messages = list(example.messages)
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    reply = {"role": "assistant", "content": str(example.answer)}
    turns = (*messages[: last + 1], reply, *messages[last:])
    return replace(example, messages=turns)


def multiplied(batch: Batch, factors: Sequence[np.ndarray]) -> Batch:
    """Multiply the coefficients of each node by factors (n,)."""
    nodes = zip(batch.nodes, factors, strict=True)
    return replace(
        batch,
        nodes=tuple(
            replace(node, coefficients=(node.coefficients * factor).astype(np.float32))
            for node, factor in nodes
        ),
    )
