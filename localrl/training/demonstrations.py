"""The worked examples of a supervised run, as groups that the update learns from.

A demonstration is a group with one completion that no sampler wrote: its tokens have no
log-probability of a sampler (NaN), no reward, and a coefficient of 1. Everything after that, from
packing to checkpoints, is that of any run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localrl.config import RunConfig
from localrl.errors import ConfigError, DataError, MemoryBudgetError
from localrl.learning.credit import Credit
from localrl.policy.conversation import EncodedConversation, encode_conversations
from localrl.policy.loading import find_model
from localrl.policy.tokenizer import Tokenizer
from localrl.processes.worker import Worker
from localrl.records import Example, Group, Leaf, MemoryPlan, Node, RewardSpec, ScoredGroup
from localrl.tasks.base import Task
from localrl.tasks.demonstrations import completion_of, load_demonstrations
from localrl.tasks.files import HELD_OUT_OF, split
from localrl.tasks.loading import NO_TASK
from localrl.tasks.rows import LISTED, tell_bad
from localrl.tasks.successes import is_run, read_successes

TOKENS = ("tokenizer.json", "tokenizer_config.json", "config.json")
"""Files of a model that decide what its token ids mean."""


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """Worked examples in tokens."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    """Worked examples that only evaluations use."""
    written: Mapping[str, EncodedConversation]
    """The tokens of each, by id."""
    texts: Mapping[str, tuple[Mapping[str, Any], ...]]
    """The chat messages after the prompt of each, by id."""
    about: str
    """Description: the source, and the number of examples."""

    @property
    def longest(self) -> tuple[int, int]:
        """The most tokens of a prompt, and of a completion."""
        all_written = self.written.values()
        return (
            max(len(one.prompt_ids) for one in all_written),
            max(len(one.token_ids) for one in all_written),
        )

    @property
    def mean(self) -> tuple[float, float]:
        """The mean tokens of a prompt, and of a completion, of those trained on."""
        some = [self.written[example.id] for example in self.training]
        prompts = sum(len(one.prompt_ids) for one in some)
        return prompts / len(some), sum(len(one.token_ids) for one in some) / len(some)

    def groups(self, examples: Sequence[Example], version: int) -> list[ScoredGroup]:
        """Return the demonstrations as groups of one completion without a reward."""
        return [self._group(example, version) for example in examples]

    def _group(self, example: Example, version: int) -> ScoredGroup:
        one, messages = self.written[example.id], self.texts[example.id]
        unknown = np.full(len(one.token_ids), np.nan, np.float32)
        node = Node(-1, one.token_ids, one.by_model, unknown, unknown, version=version)
        text = str(messages[-1].get("content") or "")
        leaf = Leaf(0, "stop", text, messages if len(messages) > 1 else ())
        group = Group(example, one.prompt_ids, (node,), (leaf,), planned_roots=1)
        return ScoredGroup(group, (None,), {})


@dataclass(frozen=True)
class SupervisedTask:
    """Demonstrations to train on, and the held-out prompts of a task; satisfies `Task`."""

    demonstrations: Demonstrations
    measured: Task | None
    """The task whose held-out prompts are sampled; None if nothing is sampled."""

    @property
    def name(self) -> str:
        """The name of the task that is measured."""
        return self.measured.name if self.measured else NO_TASK

    @property
    def description(self) -> str:
        """Description of the worked examples."""
        return self.demonstrations.about

    @property
    def rewards(self) -> tuple[RewardSpec, ...]:
        """The reward functions of evaluations."""
        return self.measured.rewards if self.measured else ()

    @property
    def environment(self) -> str | None:
        """The environment of evaluations."""
        return self.measured.environment if self.measured else None

    @property
    def train_size(self) -> int:
        """Number of demonstrations to train on."""
        return len(self.demonstrations.training)

    def train(self, index: int) -> Example:
        """Demonstration `index`."""
        return self.demonstrations.training[index]

    def evaluation(self, n: int) -> list[Example]:
        """The first `n` held-out prompts of the task."""
        return self.measured.evaluation(n) if self.measured else []


def check_room(found: Demonstrations, plan: MemoryPlan) -> None:
    """Check that the plan has room for the longest completion, which is never cut.

    Raises: MemoryBudgetError.
    """
    _, longest = found.longest
    if longest > plan.max_completion_tokens:
        raise MemoryBudgetError(
            f"There is memory for completions of {plan.max_completion_tokens} tokens, and the "
            f"longest worked example has {longest}. Take it out, raise memory.limit, or lower "
            "lora.rank or rollout.prompts_per_step."
        )


def full_credit(group: Group) -> Credit:
    """Return the credit of a demonstration: an advantage of 1, as nothing is compared with it."""
    return Credit((1.0,) * len(group.nodes), (1.0,) * len(group.nodes))


def open_demonstrations(
    config: RunConfig, model_folder: Path, worker: Worker, tokenizer: Tokenizer
) -> Demonstrations:
    """Read and encode the worked examples that `task.demonstrations` names.

    Raises: ConfigError or DataError, naming rows, for what cannot be learned from.
    """
    source = Path(config.task.demonstrations or "").expanduser()
    if is_run(source):
        found = _of_run(config, source, model_folder)
    else:
        found = _of_data(config, worker, tokenizer)
    _check_lengths(config, found)
    _check_vocabulary(found, tokenizer)
    return found


def _of_data(config: RunConfig, worker: Worker, tokenizer: Tokenizer) -> Demonstrations:
    task = load_demonstrations(config.task, worker)
    held_out = task.evaluation(config.task.held_out)
    examples = [*task.training, *held_out]
    completions = [completion_of(example) for example in examples]
    encoded = encode_conversations(tokenizer, examples, completions)
    bad = [
        (example.place or example.id, str(one))
        for example, one in zip(examples, encoded, strict=True)
        if isinstance(one, DataError)
    ]
    if bad:
        raise DataError(tell_bad(bad, len(examples)))
    pairs = zip(_unique(task.training, held_out), encoded, strict=True)
    written = {example.id: one for example, one in pairs if isinstance(one, EncodedConversation)}
    texts = {example.id: tuple(completion_of(example)) for example in examples}
    about = f"{len(task.training)} worked examples from {config.task.demonstrations}"
    held = f"; {len(held_out)} held out" if held_out else "; none held out"
    return Demonstrations(task.training, tuple(held_out), written, texts, about + held)


def _unique(training: Iterable[Example], held_out: Iterable[Example]) -> list[Example]:
    """Return all examples; ids are unique within a table, and must be across two.

    Raises: DataError if they are not.
    """
    every = [*training, *held_out]
    places = {example.id: example.place for example in every}
    for example in every:
        if places[example.id] != example.place:
            raise DataError(
                f"{example.place}: the id {example.id!r} is also used in {places[example.id]}. "
                "Make ids unique, or leave them out."
            )
    return every


def _of_run(config: RunConfig, run: Path, model_folder: Path) -> Demonstrations:
    """Take the successful completions of a run, in its own tokens."""
    _check_same_tokens(run, model_folder)
    found = read_successes(run)
    if not config.task.held_out:
        training, held_out = found.examples, ()
    else:
        training, held_out = map(tuple, split(found.examples))
    if not training:
        raise DataError(
            f"All successful completions in {run} are of one prompt, so none can be held out. To "
            "learn from them all, set task.eval_prompts=0."
        )
    held_out = held_out[: config.task.held_out]
    rest = (
        f"held out: {len(held_out)}, of one prompt in {HELD_OUT_OF}"
        if held_out
        else "none held out"
    )
    about = f"{run}: {found}; {rest}"
    return Demonstrations(training, held_out, found.written, found.texts, about)


def _check_same_tokens(run: Path, model_folder: Path) -> None:
    """Check that the run's model has the same tokens as this one.

    Raises: ConfigError if not, or if its model is gone.
    """
    name = RunConfig.of_run(run / "config.toml").model.path
    folder = find_model(name)
    for file in TOKENS:
        one, other = (place / file for place in (folder, model_folder))
        same = one.is_file() == other.is_file()
        if not same or (one.is_file() and one.read_bytes() != other.read_bytes()):
            raise ConfigError(
                f"The completions of {run} are in tokens of its model, {name or 'the embedded one'}"
                f" ({folder}), and this model is another one: {file} of {model_folder} differs. "
                "Name the run's model with --model, or leave --model out."
            )


def _check_lengths(config: RunConfig, found: Demonstrations) -> None:
    """Check that nothing is longer than the settings allow: nothing is cut.

    Raises: DataError, naming the rows.
    """
    rollout = config.rollout
    examples = [*found.training, *found.held_out]
    parts = (
        ("prompt", rollout.max_prompt_tokens, lambda one: len(one.prompt_ids)),
        ("completion", rollout.max_completion_tokens, lambda one: len(one.token_ids)),
    )
    for part, most, length in parts:
        lengths = [(e.place or e.id, length(found.written[e.id])) for e in examples]
        long = [(place, n) for place, n in lengths if n > most]
        if not long:
            continue
        others = ", ".join(f"{place} ({n})" for place, n in long[1 : LISTED + 1])
        more = f" and {len(long) - 1 - LISTED} more" if len(long) > LISTED + 1 else ""
        all_told = f" {len(long)} of {len(examples)} are too long; the others: {others}{more}."
        raise DataError(
            f"{long[0][0]}: the {part} has {long[0][1]} tokens, and {most} are allowed."
            f"{all_told if others else ''} Set rollout.max_{part}_tokens="
            f"{max(n for _, n in long)}, or shorten the rows or take them out."
        )


def _check_vocabulary(found: Demonstrations, tokenizer: Tokenizer) -> None:
    """Refuse completions with characters that the model has no token for.

    Raises: DataError.
    """
    unknown = tokenizer.unknown_id
    if unknown is None:
        return
    examples = [*found.training, *found.held_out]
    bad = [example for example in examples if unknown in _ids(found.written[example.id])]
    texts = (message.get("content") for e in bad for message in (*e.messages, *found.texts[e.id]))
    characters = [
        c for c in dict.fromkeys("".join(map(str, texts))) if unknown in tokenizer.encode_text(c)
    ]
    if characters:
        raise DataError(
            f"{bad[0].place or bad[0].id}: the model has no token for {''.join(characters)!r}, "
            f"which {len(bad)} of {len(examples)} worked examples contain. Write them without, or "
            "choose another model."
        )


def _ids(one: EncodedConversation) -> set[int]:
    return {*one.prompt_ids, *one.token_ids.tolist()}
