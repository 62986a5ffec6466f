"""Looks up reward functions by the text a user writes: a built-in's name, a file, a module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from localrl.errors import ConfigError
from localrl.processes.worker_child import NotFound, split_call
from localrl.records import RewardSpec


@dataclass(frozen=True)
class Builtin:
    """A reward that ships with the package: a function, a factory with settings, or both."""

    name: str
    """Name used in metric keys, as in TRL."""
    module: str
    help: str
    function: str = ""
    factory: str = ""
    needs: tuple[str, ...] = ()
    """Required settings of the factory."""
    seconds_each: float | None = None
    """See `RewardSpec`."""

    def target(
        self,
        text: str,
        arguments: str | None,
        defaults: str = "",
        given: Mapping[str, object] = MappingProxyType({}),
    ) -> str:
        """Target for the child process. given: settings that the arguments may override.

        Raises: ConfigError if settings are missing or unused.
        """
        if arguments is None and self.function:
            return f"{self.module}:{self.function}"
        if not self.factory:
            raise ConfigError(f"The reward {text!r} takes no settings; write {self.function}.")
        settings = defaults if arguments is None else arguments
        place = f"{self.module}:{self.factory}"
        own = _arguments(f"{place}({settings})")
        missing = [name for name in self.needs if name not in own]
        if missing:
            raise ConfigError(
                f"The reward {text!r} needs {' and '.join(missing)}; "
                f"write {text.partition('(')[0]}({', '.join(f'{n}=...' for n in self.needs)})."
            )
        added = [f"{name}={value!r}" for name, value in given.items() if name not in own]
        return f"{place}({', '.join(filter(None, [settings.strip().rstrip(','), *added]))})"


_ACCURACY = "localrl.rewards.accuracy"
_SHAPING = "localrl.rewards.shaping"
JUDGE = "localrl.rewards.judge"
"""Module of the rewards that ask a server."""
_JUDGED_S = 1900.0
"""A judge bounds its own time: three attempts of at most 600 s, and pauses. This is for hangs."""

BUILTINS: Mapping[str, Builtin] = {
    "accuracy": Builtin(
        "accuracy_reward", _ACCURACY, "the answer matches the gold one", "accuracy_reward"
    ),
    "reasoning_accuracy": Builtin(
        "reasoning_accuracy_reward",
        _ACCURACY,
        "the same after </think>, 0 without it",
        "reasoning_accuracy_reward",
    ),
    "choice": Builtin(
        "choice_reward", _ACCURACY, "the chosen letter is the gold one", "choice_reward"
    ),
    "json": Builtin(
        "json_reward",
        "localrl.rewards.json_answers",
        "the JSON equals the gold value and fits a schema",
        "json_reward",
        "get_json_reward",
        ("schema",),
    ),
    "math_verify": Builtin(
        "math_verify_reward",
        "localrl.rewards.latex",
        "the answer matches the gold one, in any LaTeX; needs localrl[math]",
        "math_verify_reward",
    ),
    "final_answer": Builtin(
        "final_answer",
        "localrl.rewards.answers",
        "the text after the last # is gold",
        "final_answer",
    ),
    "think_format": Builtin(
        "think_format_reward", _SHAPING, "<think>...</think>, then text", "think_format_reward"
    ),
    "regex": Builtin(
        "regex_reward",
        _SHAPING,
        "a regular expression matches",
        factory="get_regex_reward",
        needs=("pattern",),
    ),
    "soft_overlong": Builtin(
        "soft_overlong_punishment_reward",
        _SHAPING,
        "0 down to -1 near the maximum length",
        factory="get_soft_overlong_punishment",
        needs=("max_completion_len", "soft_punish_cache"),
    ),
    "repetition": Builtin(
        "repetition_penalty_reward",
        _SHAPING,
        "0 down to max_penalty for repeated n-grams",
        factory="get_repetition_penalty_reward",
    ),
    "cosine_scaled": Builtin(
        "cosine_scaled_reward",
        _SHAPING,
        "accuracy, scaled by length",
        factory="get_cosine_scaled_reward",
        needs=("max_len",),
    ),
    "length": Builtin(
        "length_reward",
        _SHAPING,
        "1 at the best length down to 0 at the worst",
        factory="get_length_reward",
        needs=("best", "worst"),
    ),
    "judge": Builtin(
        "judge_reward",
        JUDGE,
        "another model's score of each completion",
        factory="get_judge_reward",
        seconds_each=_JUDGED_S,
    ),
    "judge_rank": Builtin(
        "judge_rank_reward",
        JUDGE,
        "another model's ranking of the completions of a prompt",
        factory="get_judge_rank_reward",
        seconds_each=_JUDGED_S,
    ),
}
"""Built-ins by short name. The functions' and factories' own names are accepted too."""

_FULL_NAMES = {name: short for short, b in BUILTINS.items() for name in (b.function, b.factory)}
_DEFAULTS = {"get_soft_overlong_punishment": "max_completion_len=1280, soft_punish_cache=256"}
"""TRL's command-line defaults for a bare name."""

_SHORT = re.compile(r"([A-Za-z_]\w*)(?:\((.*)\))?", re.DOTALL)
_DOTTED = re.compile(r"((?:[A-Za-z_]\w*\.)+)([A-Za-z_]\w*(?:\(.*\))?)", re.DOTALL)


def parse_rewards(
    texts: Sequence[str],
    weights: Sequence[float] | None = None,
    settings: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
) -> tuple[RewardSpec, ...]:
    """The reward functions that these texts name, each with its weight.

    A text is the name of a built-in, `path/to/file.py:function`, `package.module:function`, or
    TRL's `package.module.function`. A factory is followed by its settings: `name(key=value)` with
    literal values; it is called once. Nothing is imported here; see `Scorer.check`.

    weights: one for each text; all 1 by default.
    settings: settings of built-ins by short name, for texts that do not name them.

    Rewards are named after their functions and factories, built-ins as in TRL; if two names would
    be equal, the later one gets the suffix `_2`, and so on.

    Raises:
        ConfigError: a text is none of these or is given twice, the number of weights is wrong, or
            a weight is not finite.
    """
    if weights is not None and len(weights) != len(texts):
        raise ConfigError(
            f"{len(texts)} reward functions have {len(weights)} weights; give one for each."
        )
    for text, weight in zip(texts, weights or (), strict=False):
        if not math.isfinite(weight):
            raise ConfigError(f"Reward {text!r} has weight {weight}; give a finite number.")
    rewards: list[RewardSpec] = []
    for text, weight in zip(texts, weights or [1.0] * len(texts), strict=True):
        name, target, seconds = _find(text.strip(), settings)
        if any(target == reward.target for reward in rewards):
            raise ConfigError(f"The reward {text!r} is given twice; remove one.")
        rewards.append(RewardSpec(_different(name, rewards), target, float(weight), seconds))
    return tuple(rewards)


def _find(text: str, settings: Mapping[str, Mapping[str, object]]) -> tuple[str, str, float | None]:
    """Name, target and seconds for each completion of the reward that one text names."""
    short = _SHORT.fullmatch(text)
    if short:
        key = short[1] if short[1] in BUILTINS else _FULL_NAMES.get(short[1], "")
        if key not in BUILTINS:
            raise _unknown(text, short[1])
        builtin = BUILTINS[key]
        defaults, given = _DEFAULTS.get(short[1], ""), settings.get(key, {})
        target = builtin.target(text, short[2], defaults, given)
        return builtin.name, target, builtin.seconds_each
    dotted = _DOTTED.fullmatch(text)
    target = f"{dotted[1][:-1]}:{dotted[2]}" if dotted and not text.endswith(".py") else text
    _arguments(target)
    place = split_call(target)[0]
    name = place.rpartition(":")[2].rpartition(".")[2]
    if ":" not in place or not name.isidentifier():
        raise _unknown(text, text)
    return name, target, None


def _arguments(target: str) -> Mapping[str, object]:
    try:
        return split_call(target)[1] or {}
    except NotFound as error:
        raise ConfigError(f"Reward: {error}. Write them as Python literals.") from None


def _different(name: str, rewards: Sequence[RewardSpec]) -> str:
    taken, candidate, number = {reward.name for reward in rewards}, name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _unknown(text: str, name: str) -> ConfigError:
    close = get_close_matches(name, [*BUILTINS, *filter(None, _FULL_NAMES)], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return ConfigError(
        f"Unknown reward {text!r}{hint} Name your own as path/to/file.py:function or "
        f"module:function. Built in: {', '.join(BUILTINS)}."
    )
