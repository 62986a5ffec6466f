"""Published ways to save rollouts, as stages that `with_rival` hands to a session of localrl.

| stage | paper | its rule |
|---|---|---|
| `DynamicSampling` | DAPO, Yu et al. 2025 (2503.14476) | sample on until every group has variance |
| `Skipping` | GRESO, Zheng et al. 2025 (2506.02177) | before that, skip prompts that had none |
| `Pruning` | CPPO, Lin et al. 2025 (2503.22342) | train on the k largest advantages; biased |

2-GRPO (Wu et al. 2025, 2510.00977) needs no stage: it is `learning.objective=grpo` in groups of 2.
Each stage replaces one of the product's by a subclass, so that everything else is the same. They
work in one process and with flat groups.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from math import ceil
from typing import Any

from localrl.learning.credit import Credit
from localrl.records import Example, ScoredGroup
from localrl.runs.metrics import sampled_tokens
from localrl.tasks.order import take
from localrl.training.sampler import Sampler
from localrl.training.session import Session
from localrl.utils.rng import keyed_uniforms

MOST_BATCHES = 10
"""Batches of prompts sampled for one step, as verl limits them: with prompts of which none teaches,
dynamic sampling would never end."""
WALK = 4
"""Passes over the training set after which the search for a prompt not skipped ends."""


def with_rival(session: Session, name: str | None) -> Session:
    """Return the session with a rival's stage in place of the product's; None: as it is."""
    if name == "pruning":
        return instead(Pruning, session)
    if name is not None:
        session.sampler = instead(SAMPLERS[name], session.sampler)
    return session


def discarded(session: Session) -> Discarded:
    """Return what the session's sampler has sampled and thrown away; zeros without a rival."""
    sampler = session.sampler
    return sampler.discarded if isinstance(sampler, DynamicSampling) else Discarded()


def uniform(scored: ScoredGroup) -> bool:
    """Return True if the rewards of a group are all equal, so that it teaches nothing."""
    return len({reward for reward in scored.rewards if reward is not None}) < 2


@dataclass
class Discarded:
    """Rollouts that were sampled and are in no step's groups."""

    tokens: int = 0
    completions: int = 0

    def add(self, groups: Sequence[ScoredGroup]) -> None:
        """Count these groups."""
        self.tokens += sum(map(sampled_tokens, groups))
        self.completions += sum(len(group.rewards) for group in groups)


@dataclass(eq=False)
class DynamicSampling(Sampler):
    """DAPO's dynamic sampling: prompts are sampled until a step has its number of groups, each
    with 0 < right answers < G.

    Groups of equal rewards are discarded, and so is the surplus of the last batch. A step that has
    too few after `MOST_BATCHES`, or after every training prompt, makes do with what there is; one
    without any group makes no update.
    """

    discarded: Discarded = field(default_factory=Discarded)
    _cursor: int = 0
    """Position in the order of prompts, which goes on where the last batch ended."""

    def choose(self, step: int) -> list[Example]:
        """Return the first batch of a step."""
        return self._next(self._first_size())

    def collect(self, step: int, examples: Sequence[Example], version: int) -> list[ScoredGroup]:
        """Return as many groups with variance as the step has prompts."""
        wanted = self.config.rollout.prompts_per_step
        kept: list[ScoredGroup] = []
        tried: list[ScoredGroup] = []
        for _ in range(MOST_BATCHES):
            batch = super().collect(step, examples, version)
            tried += batch
            kept += [group for group in batch if not uniform(group)]
            if len(kept) >= wanted:
                break
            known = {group.group.example.id for group in tried}
            examples = self._next(self._next_size(wanted - len(kept), batch), known)
            if not examples:
                break
        self._see(tried)
        used = kept[:wanted] or tried[-wanted:]
        kept_ids = {id(group) for group in used}
        self.discarded.add([group for group in tried if id(group) not in kept_ids])
        return used

    def _first_size(self) -> int:
        return self.config.rollout.prompts_per_step

    def _next_size(self, missing: int, batch: Sequence[ScoredGroup]) -> int:
        """Return the number of prompts of the batch after this one."""
        return self._first_size()

    def _admits(self, example: Example) -> bool:
        """Return True if this prompt may be sampled now."""
        return True

    def _see(self, tried: Sequence[ScoredGroup]) -> None:
        """Learn from all groups of a step."""

    def _next(self, count: int, known: Collection[str] = ()) -> list[Example]:
        """Return at most `count` of the next prompts that are admitted and not `known`."""
        found: dict[str, Example] = {}
        for _ in range(WALK * max(self.task.train_size, count)):
            example = self._at_cursor()
            if example.id not in known and self._admits(example):
                found[example.id] = example
            if len(found) == count:
                break
        if not found and not known:  # all are skipped, and a step needs a prompt
            return [self._at_cursor()]
        return list(found.values())

    def _at_cursor(self) -> Example:
        [example] = take(self.task, self._cursor, 1, self.config.run.seed)
        self._cursor += 1
        return example


EASY, HARD = 0, 1


@dataclass(eq=False)
class Skipping(DynamicSampling):
    """GRESO: a prompt whose last z groups had equal rewards is skipped with probability 1 - p^z.

    p is adjusted, apart for prompts with only right answers (easy) and with none (hard), so that a
    quarter of all groups has equal rewards: a third of these easy, the others hard. The first batch
    of a step has 1.5 times its prompts; further ones have min(that, 1.25 missing / (1 - alpha)),
    where alpha is the share of equal rewards in the batch before. Figures are those of the authors'
    scripts; their smallest batch of 64, for the hardware, is left out.
    """

    p: list[float] = field(default_factory=lambda: [0.5, 0.5])
    """The base exploration probability, easy and hard."""
    streaks: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By example id: EASY or HARD, and z, the number of its last groups that were such."""

    TARGETS = (0.25 / 3, 0.25 * 2 / 3)
    CHANGE, LOWEST, HIGHEST = 0.01, 0.05, 0.95
    """Of p, per step from the second epoch on."""
    LEAST = 0.01
    """Probability with which any prompt is sampled."""
    FIRST, MARGIN = 1.5, 1.25

    def skip_probability(self, example_id: str) -> float:
        """Return the probability that a prompt is skipped at its turn."""
        if example_id not in self.streaks:
            return 0.0
        kind, z = self.streaks[example_id]
        return 1 - max(self.p[kind] ** z, self.LEAST)

    def _admits(self, example: Example) -> bool:
        address = (self.config.run.seed, self._cursor, example.id, "skip")
        return float(keyed_uniforms(1, *address)[0]) >= self.skip_probability(example.id)

    def _first_size(self) -> int:
        return ceil(self.FIRST * self.config.rollout.prompts_per_step)

    def _next_size(self, missing: int, batch: Sequence[ScoredGroup]) -> int:
        informative = sum(not uniform(group) for group in batch) / len(batch)
        if not informative:
            return self._first_size()
        return min(self._first_size(), ceil(self.MARGIN * missing / informative))

    def _see(self, tried: Sequence[ScoredGroup]) -> None:
        kinds = [_kind(group) for group in tried]
        for group, kind in zip(tried, kinds, strict=True):
            example_id = group.group.example.id
            before, z = self.streaks.pop(example_id, (kind, 0))
            if kind is not None:
                self.streaks[example_id] = (kind, z + 1 if kind == before else 1)
        if not 0 < self.task.train_size < self._cursor:
            return
        for kind, target in enumerate(self.TARGETS):
            less = kinds.count(kind) / len(kinds) >= target
            changed = self.p[kind] + (-self.CHANGE if less else self.CHANGE)
            self.p[kind] = min(max(changed, self.LOWEST), self.HIGHEST)


def _kind(scored: ScoredGroup) -> int | None:
    """EASY if all rewards are 1, HARD if they are another number; None if they differ."""
    if not uniform(scored):
        return None
    return EASY if all(r is not None and r >= 1 - 1e-9 for r in scored.rewards) else HARD


@dataclass(eq=False)
class Pruning(Session):
    """CPPO: of each group only the `keep` completions with the largest |advantage| are trained.

    Which ones these are depends on their advantages, so the expected gradient is not the group's:
    it is biased. The paper's G = 16 at a pruning rate of 87.5 % also keeps 2.
    """

    keep: int = 2

    def credit(self, step: int, scored: ScoredGroup) -> Credit:
        """Return the group's credit, pruned."""
        return keep_largest(super().credit(step, scored), self.keep)


def keep_largest(credit: Credit, keep: int) -> Credit:
    """Set all but the `keep` largest advantages to 0; of equal ones the first are kept.

    The kept ones are multiplied by G / keep, as CPPO's sum is divided by the number kept. A node
    is a completion.
    """
    sizes = [-1.0 if a is None else abs(a) for a in credit.advantages]
    kept = sorted(range(len(sizes)), key=lambda i: -sizes[i])[:keep]
    factors = [len(sizes) / len(kept) if i in kept else 0.0 for i in range(len(sizes))]
    pairs = zip(credit.advantages, factors, strict=True)
    return replace(credit, advantages=tuple(None if a is None else a * f for a, f in pairs))


SAMPLERS: dict[str, type[DynamicSampling]] = {
    "dynamic sampling": DynamicSampling,
    "skipping": Skipping,
}


def instead(kind: type, stage: Any) -> Any:
    """Return a stage of this subclass with the same components."""
    return kind(**{each.name: getattr(stage, each.name) for each in fields(stage) if each.init})
