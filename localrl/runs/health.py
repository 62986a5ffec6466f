"""Warnings that a user can act on, derived only from the metrics of a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localrl.config import RunConfig

Record = Mapping[str, Any]

FEW, MANY = 5, 10
"""Steps over which metrics are averaged: to smooth the noise of one step, and to see a trend."""
CLEAR = 20
"""Consecutive steps without its cause after which a warning may be repeated."""
RIGHT = 0.9
"""Mean of the first reward from which a task counts as learned: low entropy is then no fault."""
COLLAPSED = 0.1
"""Share of the first entropy. At a tenth, a token that was a toss-up between two choices has only
one chance in a hundred for the other: the completions of a prompt hardly differ any more."""
LONGER, LONGER_TOKENS = 2.0, 16
"""Multiple of the first length, and tokens above it: short answers double by chance."""
CUT = 0.3
"""Share of completions that were cut off, above which the rewards mostly measure the limit."""
DOMINANT = 0.95
"""Share of the reward's variance due to one part alone."""
GAP = 0.1
"""Mean difference in nats between the update's log-probabilities and the sampler's. Rounding
explains 0.04 in bfloat16, 0.005 in float16 and 1e-6 in float32."""
UNREWARDED = 3
"""Steps in a row without any reward, after which a run ends."""
NO_EFFECT, NO_EFFECT_UPDATES = 1e-5, 20
"""Relative size of the adapters. At the default rate it is 1e-3 after this many updates."""


@dataclass(frozen=True)
class Warning:
    """A problem, and the advice on it."""

    name: str
    text: str


class Health:
    """Checks the metrics of every step, in order; warns once about each problem until it is
    over."""

    def __init__(self, config: RunConfig, weights: Mapping[str, float]) -> None:
        """weights: weights of the reward functions, by name; the first one decides what is
        correct."""
        self._config = config
        self._weights = dict(weights)
        self._first: list[Record] = []
        self._last: deque[Record] = deque(maxlen=2 * MANY)
        self._updates = 0
        self._quiet: dict[str, int] = {}
        """Steps since the cause was last seen, for warnings that may not be repeated yet."""

    def see(self, record: Record) -> list[Warning]:
        """Return the new warnings after this step. Records of evaluations are ignored."""
        if "reward" not in record:
            return []
        if len(self._first) < FEW:
            self._first.append(record)
        self._last.append(record)
        self._updates += bool(record.get("update/applied"))
        checks: tuple[Callable[[], Warning | None], ...] = (self._no_effect,)
        if not self._config.supervised:
            checks = (*self._of_samples(), *checks)
        found = [warning for check in checks if (warning := check()) is not None]
        fresh = [warning for warning in found if warning.name not in self._quiet]
        seen = {warning.name for warning in found}
        quiet = {name: steps + 1 for name, steps in self._quiet.items() if steps + 1 < CLEAR}
        self._quiet = quiet | dict.fromkeys(seen, 0)
        return fresh

    def _of_samples(self) -> tuple[Callable[[], Warning | None], ...]:
        """Return the checks of what was sampled and rewarded."""
        return (
            self._unrewarded,
            self._entropy,
            self._length,
            self._cut,
            self._equal,
            self._dominant,
            self._gap,
        )

    def _unrewarded(self) -> Warning | None:
        if self._last[-1]["reward"] is not None:
            return None
        return Warning(
            "no_reward",
            f"No completion of this step got a reward: {', '.join(self._weights)} gave None for "
            "all of them, or failed, so it taught nothing. A run ends after "
            f"{UNREWARDED} such steps in a row.",
        )

    def _entropy(self) -> Warning | None:
        now, first = self._mean("entropy", FEW), _mean(self._first, "entropy")
        if now is None or not first or now >= COLLAPSED * first or self._rising():
            return None
        if self._right():
            return None
        return Warning(
            "entropy_collapse",
            f"The entropy is {now:.2g} nats per token, {now / first:.0%} of its initial "
            f"{first:.2g}, and the reward no longer rises: completions of a prompt are nearly "
            "identical, so there is little left to compare. Start again with a lower "
            f"learning.lr (now {self._config.learning.lr:g}), or keep the model closer to its "
            "start with learning.kl_coef=0.01.",
        )

    def _length(self) -> Warning | None:
        name = "completions/mean_length"
        now, first = self._mean(name, FEW), _mean(self._first, name)
        if now is None or first is None or self._rising() or self._right():
            return None
        if now < LONGER * first or now < first + LONGER_TOKENS:
            return None
        return Warning(
            "length_runaway",
            f"Completions have {now:.0f} tokens, {now / first:.1f} times the initial {first:.0f}, "
            "and the reward does not rise with them. Reward long ones less "
            "(task.cut_reward=0, or a reward for short answers), or lower "
            f"rollout.max_completion_tokens (now {self._config.rollout.max_completion_tokens}).",
        )

    def _cut(self) -> Warning | None:
        now = self._mean("completions/clipped_ratio", FEW)
        if now is None or now <= CUT:
            return None
        return Warning(
            "truncation",
            f"{now:.0%} of the completions of the last {FEW} steps were cut off before their end. "
            "Raise rollout.max_completion_tokens (now "
            f"{self._config.rollout.max_completion_tokens}), or teach shorter answers with "
            "task.cut_reward=0.",
        )

    def _equal(self) -> Warning | None:
        if self._config.rollout.completions < 2:
            return None  # a single completion has nothing to be equal to
        share, reward = self._mean("frac_reward_zero_std", MANY), self._mean("reward", MANY)
        if share is None or share < 1.0 or reward is None:
            return None
        head = f"All completions of a prompt had equal rewards in the last {MANY} steps"
        if self._right():
            text = "the task is learned. Stop, or use harder prompts."
        else:
            text = (
                f"the mean is {reward:.3g}, and nothing is learned from them. Look at them with "
                "`localrl show RUN --samples`: if the task is too hard, use easier prompts or a "
                "larger rollout.group_size; if answers are right, the reward does not notice it."
            )
        return Warning("equal_rewards", f"{head}: {text}")

    def _dominant(self) -> Warning | None:
        """Warn of a dominant part other than the first, which may well decide alone."""
        if len(self._last) < MANY:
            return None
        spreads = {
            name: sum((weight * (r.get(f"rewards/{name}/std") or 0.0)) ** 2 for r in self._recent())
            for name, weight in self._weights.items()
        }
        name, first = max(spreads, key=lambda name: spreads[name]), next(iter(spreads))
        share = spreads[name] / (sum(spreads.values()) or 1.0)
        others = [other for other in spreads if other != name and spreads[other] > 0]
        if name == first or not others or share <= DOMINANT:
            return None
        weights = ", ".join(f"{name} {weight:g}" for name, weight in self._weights.items())
        return Warning(
            "dominant_reward",
            f"The reward {name!r} causes {share:.0%} of the differences between completions; "
            f"{', '.join(map(repr, others))} hardly count. Change task.reward_weights "
            f"(now {weights}).",
        )

    def _gap(self) -> Warning | None:
        now = self._mean("sampling/sampling_logp_difference/mean", FEW)
        if now is None or now <= GAP:
            return None
        return Warning(
            "sampler_gap",
            f"The update's log-probabilities differ from the sampler's by {now:.2g} nats per token "
            "in the mean, more than rounding explains (0.04 in bfloat16, 0.005 in float16): it "
            "learns from another policy than the one that wrote the completions. Start again with "
            "model.dtype=fp32; if that does not help, please report it with the model's name.",
        )

    def _no_effect(self) -> Warning | None:
        size = self._last[-1].get("update/relative_size")
        if size is None or self._updates < NO_EFFECT_UPDATES or size >= NO_EFFECT:
            return None
        return Warning(
            "no_effect",
            f"After {self._updates} updates the adapters change the weights by only {size:.1g} of "
            f"their size, too little to affect the output. Raise learning.lr "
            f"(now {self._config.learning.lr:g}).",
        )

    def _recent(self) -> list[Record]:
        return list(self._last)[-MANY:]

    def _mean(self, name: str, steps: int) -> float | None:
        """Return the mean over the last steps; None if there are too few, or none has the
        number."""
        return _mean(list(self._last)[-steps:], name) if len(self._last) >= steps else None

    def _rising(self) -> bool:
        """Return True if the mean reward of the last steps exceeds that before, or is unknown."""
        records = list(self._last)
        before, now = _mean(records[:-MANY], "reward"), _mean(records[-MANY:], "reward")
        return len(records) < 2 * MANY or before is None or now is None or now > before

    def _right(self) -> bool:
        first = next(iter(self._weights))
        return (self._mean(f"rewards/{first}/mean", MANY) or 0.0) >= RIGHT


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return sum(values) / len(values) if values else None
