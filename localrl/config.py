"""The configuration of a run: reading, checking and writing its settings.

Precedence, lowest first: the defaults in settings.py, the demonstration's own values (only when no
model is named), a TOML file, `--set key=value` and flags. An unknown key is an error that names the
closest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from localrl.errors import ConfigError
from localrl.settings import (
    LearningConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    RolloutConfig,
    RunSection,
    TaskConfig,
)
from localrl.utils.config_files import found_beside

ALIASES = {
    "model_name_or_path": "model.path",
    "num_generations": "rollout.group_size",
    "max_completion_length": "rollout.max_completion_tokens",
    "temperature": "rollout.temperature",
    "learning_rate": "learning.lr",
    "lr_scheduler_type": "learning.lr_schedule",
    "loss_type": "learning.objective",
    "beta": "learning.kl_coef",
    "epsilon": "learning.clip_low",
    "epsilon_high": "learning.clip_high",
    "mask_truncated_completions": "learning.mask_truncated",
    "num_iterations": "learning.updates_per_step",
    "max_grad_norm": "learning.max_grad_norm",
    "lora_r": "lora.rank",
    "max_steps": "run.steps",
    "output_dir": "run.out",
    "seed": "run.seed",
}
"""TRL's names of settings, accepted wherever a key is."""

KAPPA = 4.0
"""Default of `learning.kappa`; with two siblings, one alone is a poor baseline: see
docs/strategies.md."""
REMOVED: Mapping[str, Any] = {
    "rollout.prompt_order": "shuffled",
    "rollout.uniform_share": 0.1,
    "rollout.rounds": 0,
    "rollout.give_up": 0.9,
    "rollout.roots": 2,
    "rollout.fork_gap": 0,
    "rollout.replay_groups": 0,
    "rollout.replay_age": 8,
    "rollout.replay_drift": 0.02,
    "learning.keep_completions": 0,
}
"""Settings of earlier versions with the values that change nothing, which are accepted."""
REMOVED_STRATEGIES: Mapping[str, str] = {"adaptive-tree": "tree"}
"""Earlier values of rollout.strategy, and what stands for them where nothing is trained."""
OLDER_RUNS: Mapping[str, Any] = {"task.eval_temperature": 1.0}
"""Values for runs whose config.toml predates these settings, where today's default differs."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. `RunConfig()` holds the defaults for real models."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    run: RunSection = field(default_factory=RunSection)

    @classmethod
    def create(
        cls, settings: Mapping[str, Any] | None = None, file: str | Path | None = None
    ) -> RunConfig:
        """Build a configuration from defaults, a TOML file and `section.key` settings, in that
        order.

        If neither names a model, the demonstration's values for the embedded model come first.

        Raises: ConfigError for an unreadable file, an unknown key or a value out of range.
        """
        written = found_beside(read_toml(Path(file)), Path(file).parent) if file else {}
        given = {**written, **_canonical(settings or {})}
        if given.get("model.path") is None:
            given = {**demonstration(given.get("task.name")), **given}
        config = cls()
        for key, value in given.items():
            config = config.replace(key, value)
        return config

    @classmethod
    def of_run(
        cls, file: Path, settings: Mapping[str, Any] | None = None, *, to_train: bool = False
    ) -> RunConfig:
        """Build a configuration from a run's config.toml, also an older run's, and settings over
        it.

        to_train: removed settings that had an effect are an error; otherwise they do not matter.

        Raises: as `create` does.
        """
        own = _read(file)
        if not to_train:
            own = {key: value for key, value in own.items() if key not in REMOVED}
            if (strategy := str(own.get("rollout.strategy"))) in REMOVED_STRATEGIES:
                own["rollout.strategy"] = REMOVED_STRATEGIES[strategy]
        return cls.create({**OLDER_RUNS, **_canonical(own), **_canonical(settings or {})})

    @property
    def supervised(self) -> bool:
        """True if the run learns from given completions, and samples only in evaluations."""
        return self.task.demonstrations is not None

    @property
    def eval_temperature(self) -> float:
        """Evaluation temperature: that of training unless `task.eval_temperature` is set."""
        wish = self.task.eval_temperature
        return self.rollout.temperature if wish is None else wish

    @property
    def tracker_weight(self) -> float:
        """Weight of the tracker in baselines: `learning.kappa`, or 4 where completions of a prompt
        are too few, or too dependent, to be a baseline for each other."""
        if self.learning.kappa is not None:
            return self.learning.kappa
        plain = self.rollout.strategy == "flat" and self.rollout.completions > 2
        return 0.0 if plain else KAPPA

    def replace(self, key: str, value: Any) -> RunConfig:
        """Return a copy with one `section.key` set to a checked value."""
        section, _, name = key.partition(".")
        spec = _spec(key)
        checked = _check(key, value, spec)
        changed = dataclasses.replace(getattr(self, section), **{name: checked})
        return dataclasses.replace(self, **{section: changed})

    def value(self, key: str) -> Any:
        """Return the value of a `section.key`."""
        section, _, name = key.partition(".")
        return getattr(getattr(self, section), name)

    def to_toml(self) -> str:
        """Write the whole configuration as commented TOML that reads back unchanged."""
        lines = []
        for section in dataclasses.fields(self):
            values = getattr(self, section.name)
            lines += [f"[{section.name}]  # {(values.__doc__ or '').strip()}"]
            for spec in dataclasses.fields(values):
                value = getattr(values, spec.name)
                text = f"# {spec.name} =" if value is None else f"{spec.name} = {_toml(value)}"
                lines.append(f"{text:<36}# {_comment(spec)}")
            lines.append("")
        return "\n".join(lines)


def demonstration(task: str | None = None) -> dict[str, Any]:
    """Return settings that suit the embedded model; the prompt count only for its own task."""
    settings = read_toml(Path(__file__).with_name("demo.toml"))
    if task not in (None, settings["task.name"]):
        del settings["task.train_prompts"]
    return settings


def keys() -> list[str]:
    """List every `section.key`, in order."""
    sections = dataclasses.fields(RunConfig())
    return [
        f"{section.name}.{spec.name}"
        for section in sections
        for spec in dataclasses.fields(getattr(RunConfig(), section.name))
    ]


def read_toml(path: Path) -> dict[str, Any]:
    """Read the `section.key` settings in a TOML file.

    Raises: ConfigError if the file is missing, is not TOML, or contains an unknown key.
    """
    return _canonical(_read(path))


def _read(path: Path) -> dict[str, Any]:
    """Read a TOML file, with its sections' keys as `section.key`.

    Raises: ConfigError if it is missing or is not TOML.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": entry for key, entry in value.items()})
        else:
            flat[name] = value
    return flat


def parse_setting(text: str) -> tuple[str, Any]:
    """Split `section.key=value`; the value is parsed as TOML, else kept as plain text.

    Raises: ConfigError if there is no `=`.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} has no '='. Write it as --set rollout.group_size=8.")
    try:
        return key.strip(), tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def closest(word: str, known: Iterable[str]) -> str:
    """Suggest the known word most like this one in a sentence, or return an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def _canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replace aliases by the settings' own names; setting one key under two names is an error."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        key = ALIASES.get(name, name)
        if key in REMOVED:
            _check_removed(key, value)
            continue
        _spec(key)
        if key in result:
            raise ConfigError(f"{key} is set twice, the second time as {name!r}. Keep one of them.")
        result[key] = value
    return result


def _check_removed(key: str, value: Any) -> None:
    """Check that a removed setting has the value without effect.

    Raises: ConfigError if it has not.
    """
    if value != REMOVED[key]:
        raise ConfigError(
            f"{key} is {value!r}, but this setting was removed: it did not help, see "
            "docs/strategies.md. Leave it out, or use version 0.1."
        )


def _spec(key: str) -> dataclasses.Field[Any]:
    section, _, name = key.partition(".")
    config = RunConfig()
    if name and section in {entry.name for entry in dataclasses.fields(config)}:
        for spec in dataclasses.fields(getattr(config, section)):
            if spec.name == name:
                return spec
    bare = [known for known in keys() if known.endswith(f".{key}")]
    hint = f" Did you mean {bare[0]!r}?" if bare else closest(key, [*keys(), *ALIASES])
    raise ConfigError(f"Unknown setting {key!r}.{hint} See `localrl train --print-config`.")


def _check(key: str, value: Any, spec: dataclasses.Field[Any]) -> Any:
    """Check a value against the field's type and range.

    Only an int is converted, to float, and a date of TOML, to text.
    """
    kind = str(spec.type).split(" | ")[0]
    value = value.isoformat() if isinstance(value, date) else value
    if value is None and "None" in str(spec.type):
        return None
    if kind.startswith("tuple["):
        return _check_list(key, value, kind.removeprefix("tuple[").removesuffix(", ...]"), spec)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value).__name__ != kind:
        raise ConfigError(f"{key} is {value!r}; it must be of type {kind} ({_help(spec)}).")
    low, high, choices = (spec.metadata[name] for name in ("low", "high", "choices"))
    if spec.metadata["or_zero"] and value == 0:
        return value
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        bounds = f"0, or {bounds}" if spec.metadata["or_zero"] else bounds
        raise ConfigError(f"{key} is {value!r}; it must be {bounds} ({_help(spec)}).")
    if choices and value not in choices:
        wanted = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise ConfigError(f"{key} is {value!r}; it must be {wanted} ({_help(spec)}).")
    form = spec.metadata["form"]
    if form and not re.fullmatch(form, str(value)):
        raise ConfigError(f"{key} is {value!r}; its form is wrong ({_help(spec)}).")
    return value


def _check_list(key: str, value: Any, kind: str, spec: dataclasses.Field[Any]) -> tuple[Any, ...]:
    """Check the values and return them as a tuple; a single one needs no brackets."""
    values = value if isinstance(value, list | tuple) else [value]
    if kind == "float":
        values = [float(v) if type(v) is int else v for v in values]
    wrong = [v for v in values if type(v).__name__ != kind]
    if wrong:
        raise ConfigError(f"{key} has {wrong[0]!r}; each must be of type {kind} ({_help(spec)}).")
    return tuple(values)


def _help(spec: dataclasses.Field[Any]) -> str:
    return spec.metadata["help"]


def _comment(spec: dataclasses.Field[Any]) -> str:
    choices = spec.metadata["choices"]
    return f"{_help(spec)} ({', '.join(choices)})" if choices else _help(spec)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML uses JSON's escapes, except for one character that only TOML escapes.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
