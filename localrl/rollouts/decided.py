"""Ends completions whose outcome is decided: what they would still write cannot change the reward.

At the token after which a function of the task says so, a completion ends, and is scored as it is.
That token is a stopping time and the reward depends on nothing later, so the tokens left out would
have added noise to the gradient, and nothing to its mean. Not so with lengths in the objective: see
docs/rewards.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from localrl.policy.tokenizer import Tokenizer
from localrl.records import Example, Group, Leaf, Node
from localrl.rollouts.batch import DecodeLog, Rows

Decide = Callable[[Sequence[Group]], Sequence[bool]]
"""Returns for each group, of one completion so far, if its outcome is decided."""


@dataclass(eq=False)
class Decisions:
    """Asks after every token which completions are decided."""

    decide: Decide
    tokenizer: Tokenizer
    _log: DecodeLog | None = None
    _written: dict[int, list[int]] = field(default_factory=dict)
    """Tokens on the path to the end of each segment of the log."""

    def ended(
        self, live: Rows, log: DecodeLog, tokens: np.ndarray, asked: np.ndarray
    ) -> np.ndarray:
        """Append the tokens just drawn, (B,); return those of the rows `asked` that are decided.

        Both are (B,) bool.
        """
        if log is not self._log:
            self._log, self._written = log, {}
        for row in np.flatnonzero(live.alive):
            self._path(log, int(live.segments[row])).append(int(tokens[row]))
        decided = np.zeros(len(live), bool)
        rows = np.flatnonzero(live.alive & asked)
        if len(rows):
            decided[rows] = self.decide([self._group(log, int(live.segments[row])) for row in rows])
        return decided

    def _path(self, log: DecodeLog, segment: int) -> list[int]:
        """Return the tokens of a segment; one that was just begun has those of its path so far."""
        if segment not in self._written:
            parent = log.open[segment].parent
            before = log.request(segment).before if parent < 0 else self._written[parent]
            self._written[segment] = list(before)
        return self._written[segment]

    def _group(self, log: DecodeLog, segment: int) -> Group:
        """Build the record of a completion so far, for the function."""
        example, ids = log.request(segment).example, self._written[segment]
        assert example is not None, "only groups of examples are decided"
        return unfinished(example, ids, self.tokenizer)


def unfinished(example: Example, ids: Sequence[int], tokenizer: Tokenizer) -> Group:
    """Return a group of one completion that has these tokens so far."""
    nothing = np.zeros(len(ids), np.float32)
    node = Node(-1, np.array(ids, np.int32), np.ones(len(ids), bool), nothing, nothing)
    return Group(example, (), (node,), (Leaf(0, "decided", tokenizer.decode(ids)),), 1)
