"""Replay: groups of earlier steps, stored with their rewards to be trained on again.

Only whole groups with unequal rewards are stored, never successes alone, so the baseline does not
change. This module decides which groups are stored and which may be drawn; correcting for the
earlier policy is up to the learner.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from localrl.records import Example, Group, ScoredGroup
from localrl.utils.rng import keyed_uniforms

CAPACITY = 512
"""Maximum number of groups stored; the oldest are dropped."""
DIFFICULTY = (0.1, 0.9)
"""Success rates between which a prompt is replayed: outside, it has little to teach."""


@dataclass
class ReplayCounts:
    """Counts of stored groups drawn and rejected so far, by reason."""

    drawn: int = 0
    age: int = 0
    """Dropped because too many updates have been made since."""
    difficulty: int = 0
    """Skipped in a draw because the prompt is now too easy or too hard."""
    prompt: int = 0
    """Dropped because the prompt is now encoded to different tokens."""
    drift: int = 0
    """Dropped after a draw because the policy has moved too far from the one that sampled them."""


@dataclass(frozen=True)
class Stored:
    """A stored group."""

    scored: ScoredGroup
    updates: int
    """Number of policy updates made before it was sampled."""


@dataclass(eq=False)
class Replay:
    """The newest mixed group of each example."""

    capacity: int = CAPACITY
    counts: ReplayCounts = field(default_factory=ReplayCounts)
    _stored: dict[str, Stored] = field(default_factory=dict)
    """By example id, the oldest first."""

    def __len__(self) -> int:
        return len(self._stored)

    def copy(self) -> Replay:
        """Return an independent copy; the groups themselves are immutable."""
        return replace(self, counts=replace(self.counts), _stored=dict(self._stored))

    def add(self, scored: Sequence[ScoredGroup], updates: int) -> None:
        """Store the groups with unequal rewards, sampled after `updates` policy updates.

        A group written entirely by earlier policies is not stored: it would seem newer than it is.
        """
        for group in scored:
            if _mixed(group) and not _all_stale(group.group):
                example_id = group.group.example.id
                self._stored.pop(example_id, None)
                fresh = replace(group, group=without_old_logprobs(group.group))
                self._stored[example_id] = Stored(fresh, updates)
        for example_id in list(self._stored)[: max(0, len(self._stored) - self.capacity)]:
            del self._stored[example_id]

    def draw(
        self,
        count: int,
        *,
        updates: int,
        max_age: int,
        difficulty: Callable[[Example], float | None],
        encode: Callable[[Example], tuple[int, ...]],
        address: tuple[int | str, ...],
        exclude: Collection[str] = (),
    ) -> list[ScoredGroup]:
        """Draw at most `count` groups, 1 to `max_age` updates old, with equal probability.

        `updates` is the number made so far, `difficulty` returns an example's success rate (None:
        unknown), `encode` its prompt's current tokens; examples in `exclude` are skipped. A group's
        random number depends only on the address and its example.
        """
        self._expire(updates - max_age)
        ready = [i for i, s in self._stored.items() if s.updates < updates and i not in exclude]
        order = sorted(ready, key=lambda i: (float(keyed_uniforms(1, *address, i)[0]), i))
        found: list[ScoredGroup] = []
        for example_id in order:
            if len(found) >= count:
                break
            scored = self._stored[example_id].scored
            if self._usable(scored.group, difficulty, encode):
                found.append(scored)
        self.counts.drawn += len(found)
        return found

    def reject(self, scored: ScoredGroup) -> None:
        """Drop a drawn group because the policy has moved too far from the one that wrote it."""
        if self._stored.pop(scored.group.example.id, None) is not None:
            self.counts.drift += 1

    def _expire(self, oldest: int) -> None:
        for example_id in [i for i, s in self._stored.items() if s.updates < oldest]:
            del self._stored[example_id]
            self.counts.age += 1

    def _usable(
        self,
        group: Group,
        difficulty: Callable[[Example], float | None],
        encode: Callable[[Example], tuple[int, ...]],
    ) -> bool:
        share, (low, high) = difficulty(group.example), DIFFICULTY
        if share is None or not low <= share <= high:
            self.counts.difficulty += 1
            return False
        if tuple(encode(group.example)) != group.prompt_ids:
            del self._stored[group.example.id]
            self.counts.prompt += 1
            return False
        return True


def without_old_logprobs(group: Group) -> Group:
    """The group without `old_logprobs`: those of a past step are not valid for the next one."""
    return replace(group, nodes=tuple(replace(n, old_logprobs=None) for n in group.nodes))


def _mixed(scored: ScoredGroup) -> bool:
    return len({reward for reward in scored.rewards if reward is not None}) > 1


def _all_stale(group: Group) -> bool:
    return all(node.old_logprobs is not None for node in group.nodes)
