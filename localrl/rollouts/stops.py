"""Rules that end completions early, based on the tokens generated so far.

There are two rules: a completion that repeats itself rarely ends by itself and only costs time, and
one that has written a stop text is complete. Both look only at generated text, never at the
prompt or at anything later, so the tokens kept are those that would have been drawn without them.
If several reasons apply at the same token, the first of these counts: stop, closed, loop, length.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from localrl.errors import ConfigError
from localrl.policy.tokenizer import Tokenizer
from localrl.utils.repetition import LONGEST_PERIOD, NEEDED

SPARE = 8
"""Tokens examined beyond the most that a stop text can fill: some decode to nothing."""
LONGEST_TEXT = LONGEST_PERIOD - SPARE
NO_TOKEN = -1

Early = Literal["closed", "loop"]


@dataclass(eq=False)
class RecentTokens:
    """The latest tokens of each row, and how long it has been repeating; forks copy them."""

    recent: np.ndarray
    """Token ids (B, LONGEST_PERIOD) int32, newest first; NO_TOKEN where there is none yet."""
    runs: np.ndarray
    """Run lengths (B, LONGEST_PERIOD) int32: column p - 1 counts the latest consecutive tokens that
    equal the one p before."""

    def take(self, keep: np.ndarray) -> None:
        """Keep these rows only; an index that repeats forks its row."""
        self.recent, self.runs = self.recent[keep], self.runs[keep]

    def extend(self, other: RecentTokens) -> None:
        """Add the rows of another batch."""
        self.recent = np.concatenate([self.recent, other.recent])
        self.runs = np.concatenate([self.runs, other.runs])

    def push(self, tokens: np.ndarray) -> None:
        """Append one token to every row."""
        self.runs += 1
        self.runs *= self.recent == tokens[:, None]
        self.recent[:, 1:] = self.recent[:, :-1]
        self.recent[:, 0] = tokens

    def loops(self) -> np.ndarray:
        """Return the rows that repeat themselves, (B,) bool."""
        return np.any(self.runs >= NEEDED, axis=1)

    def last(self, row: int, count: int) -> list[int]:
        """Return up to `count` of the latest tokens of one row, newest last."""
        tokens = self.recent[row, :count]
        return tokens[tokens != NO_TOKEN][::-1].tolist()


@dataclass(frozen=True, eq=False)
class Stops:
    """The active rules; built by `make_stops`."""

    loops: bool
    texts: tuple[str, ...]
    tokenizer: Tokenizer
    completing: np.ndarray
    """Tokens that may complete a stop text, (V + 1,) bool by token id. The last entry is false
    and covers ids that the model has but the tokenizer lacks."""

    def begin(self, before: Sequence[Sequence[int]]) -> RecentTokens:
        """Initial state of rows whose completions begin with these tokens, which may be empty."""
        shape = (len(before), LONGEST_PERIOD)
        recent_tokens = RecentTokens(np.full(shape, NO_TOKEN, np.int32), np.zeros(shape, np.int32))
        longest = max(len(tokens) for tokens in before)
        for t in range(longest):
            # Rows are aligned at the end, so shorter ones start later.
            starts = [t - longest + len(tokens) for tokens in before]
            pairs = zip(before, starts, strict=True)
            recent_tokens.push(np.array([tokens[i] if i >= 0 else NO_TOKEN for tokens, i in pairs]))
        return recent_tokens

    def ended(
        self, recent_tokens: RecentTokens, tokens: np.ndarray, alive: np.ndarray
    ) -> dict[Early, np.ndarray]:
        """Append the tokens just drawn; return (B,) bool per reason, in order of precedence."""
        recent_tokens.push(tokens)
        closed, loop = (np.zeros(len(tokens), bool) for _ in range(2))
        candidates = self.completing[np.minimum(tokens, len(self.completing) - 1)] & alive
        for row in np.flatnonzero(candidates):
            closed[row] = any(self._ends(text, recent_tokens, int(row)) for text in self.texts)
        return {"closed": closed, "loop": recent_tokens.loops() if self.loops else loop}

    def _ends(self, text: str, recent_tokens: RecentTokens, row: int) -> bool:
        """True if the latest token of a row has completed this text."""
        # A token of the text holds at least one of its bytes.
        count = len(text.encode()) + SPARE
        return text in self.tokenizer.decode(recent_tokens.last(row, count))


def make_stops(tokenizer: Tokenizer, *, loops: bool, texts: Sequence[str]) -> Stops | None:
    """Build the rules, or return None if neither is wanted.

    Raises: ConfigError if a stop text is empty, or too long to be searched for.
    """
    if not loops and not texts:
        return None
    for text in texts:
        if not 1 <= len(text.encode()) <= LONGEST_TEXT:
            raise ConfigError(
                f"A stop text may have 1 to {LONGEST_TEXT} bytes; rollout.stop_text holds {text!r}."
            )
    return Stops(loops, tuple(texts), tokenizer, _completing(tokenizer, {t[-1] for t in texts}))


def _completing(tokenizer: Tokenizer, last: Collection[str]) -> np.ndarray:
    """Tokens whose text contains one of these characters, or part of one, (V + 1,) bool."""
    if not last:
        return np.zeros(1, bool)
    ids = tokenizer.inner.get_vocab().values()
    found = np.zeros(max(ids) + 2, bool)
    for token in ids:
        # Decoded twice because some tokenizers drop the space before the first word.
        written = tokenizer.decode([token, token])
        # U+FFFD stands for bytes that are not a character by themselves.
        found[token] = not {"\ufffd", *last}.isdisjoint(written)
    return found
