"""Completions that end early by a rule on what has been generated so far.

Two rules: a completion that repeats itself rarely ends by itself and only costs time, and one
that has written the stop text has said all that is asked of it. Both look at what was generated,
never at the prompt and at nothing that comes later, so what is kept is what would have been drawn
without them. When several reasons coincide at a token, the first of these counts: stop, closed,
loop, length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from localrl.errors import ConfigError
from localrl.policy.tokenizer import Tokenizer
from localrl.utils.repetition import LONGEST_PERIOD, NEEDED

SPARE = 8
"""Tokens looked at beyond those that the stop text can fill: some decode to nothing."""
LONGEST_TEXT = LONGEST_PERIOD - SPARE
NO_TOKEN = -1

Early = Literal["closed", "loop"]


@dataclass(eq=False)
class RecentTokens:
    """What each row has drawn last, and how long it has been repeating; forks copy it."""

    recent: np.ndarray
    """(B, LONGEST_PERIOD) int32, the newest first; NO_TOKEN where there is none yet."""
    runs: np.ndarray
    """(B, LONGEST_PERIOD) int32: in column p - 1, how many of the last tokens in a row equal the
    one p before."""

    def take(self, keep: np.ndarray) -> None:
        """Keep these rows only; an index that repeats forks its row."""
        self.recent, self.runs = self.recent[keep], self.runs[keep]

    def extend(self, other: RecentTokens) -> None:
        """Add the rows of another batch."""
        self.recent = np.concatenate([self.recent, other.recent])
        self.runs = np.concatenate([self.runs, other.runs])

    def push(self, tokens: np.ndarray) -> None:
        """Go on by one token in every row."""
        self.runs += 1
        self.runs *= self.recent == tokens[:, None]
        self.recent[:, 1:] = self.recent[:, :-1]
        self.recent[:, 0] = tokens

    def loops(self) -> np.ndarray:
        """(B,) bool: rows that repeat themselves."""
        return np.any(self.runs >= NEEDED, axis=1)

    def last(self, row: int, count: int) -> list[int]:
        """At most so many tokens of one row, the newest last."""
        tokens = self.recent[row, :count]
        return tokens[tokens != NO_TOKEN][::-1].tolist()


@dataclass(frozen=True, eq=False)
class Stops:
    """The rules that are wanted; made by `make_stops`."""

    loops: bool
    text: str | None
    tokenizer: Tokenizer
    completing: np.ndarray
    """(V + 1,) bool by token id: tokens that may complete the stop text. The last entry, false,
    serves ids that the model has and the tokenizer has not."""

    def begin(self, before: Sequence[Sequence[int]]) -> RecentTokens:
        """The state of rows whose completions begin with these tokens, none or more for each."""
        shape = (len(before), LONGEST_PERIOD)
        tails = RecentTokens(np.full(shape, NO_TOKEN, np.int32), np.zeros(shape, np.int32))
        longest = max(len(tokens) for tokens in before)
        for t in range(longest):
            # The rows end together, so that shorter ones begin later.
            starts = [t - longest + len(tokens) for tokens in before]
            pairs = zip(before, starts, strict=True)
            tails.push(np.array([tokens[i] if i >= 0 else NO_TOKEN for tokens, i in pairs]))
        return tails

    def ended(
        self, tails: RecentTokens, tokens: np.ndarray, alive: np.ndarray
    ) -> dict[Early, np.ndarray]:
        """Go on by the tokens just drawn; per reason, (B,) bool, in order of precedence."""
        tails.push(tokens)
        nowhere = np.zeros(len(tokens), bool)
        closed = nowhere if self.text is None else self._closed(self.text, tails, tokens, alive)
        return {"closed": closed, "loop": tails.loops() if self.loops else nowhere}

    def _closed(
        self, text: str, tails: RecentTokens, tokens: np.ndarray, alive: np.ndarray
    ) -> np.ndarray:
        """(B,) bool: living rows whose text has just come to contain the stop text."""
        candidates = self.completing[np.minimum(tokens, len(self.completing) - 1)] & alive
        # A token of the stop text holds at least one of its bytes.
        count = len(text.encode()) + SPARE
        closed = np.zeros(len(tokens), bool)
        for row in np.flatnonzero(candidates):
            closed[row] = text in self.tokenizer.decode(tails.last(int(row), count))
        return closed


def make_stops(tokenizer: Tokenizer, *, loops: bool, text: str | None) -> Stops | None:
    """The rules, or None when neither is wanted; no text and an empty one are the same.

    Raises: ConfigError when the stop text is too long to be looked for.
    """
    if not loops and not text:
        return None
    if text and len(text.encode()) > LONGEST_TEXT:
        raise ConfigError(f"The stop text may have at most {LONGEST_TEXT} bytes: {text!r}")
    completing = _completing(tokenizer, text[-1]) if text else np.zeros(1, bool)
    return Stops(loops, text or None, tokenizer, completing)


def _completing(tokenizer: Tokenizer, last: str) -> np.ndarray:
    """(V + 1,) bool: tokens whose text holds this character, or a part of one."""
    ids = tokenizer.inner.get_vocab().values()
    found = np.zeros(max(ids) + 2, bool)
    for token in ids:
        # Twice, since some tokenizers drop the space before the first word.
        written = tokenizer.decode([token, token])
        # U+FFFD stands for bytes that are no character by themselves.
        found[token] = last in written or "\ufffd" in written
    return found
