"""The state of a run between two steps: captured, written as a checkpoint, read, and restored.

It holds everything that the next step depends on: adapters, optimizer, prompt statistics, groups
kept for replay and reuse, fork positions, the plan, and the log offsets. Random numbers need no
state: every draw is made from its address. The data cursor is the step.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localrl.backend import mx, tree_flatten, tree_unflatten
from localrl.config import RunConfig, keys
from localrl.engines.cpu.kernel_choice import Choice
from localrl.errors import CheckpointError, ConfigError
from localrl.evaluate import Evaluation, Shown
from localrl.learning.tracker import PromptStats, Tracker
from localrl.memory.adapting import MemoryMonitor, smaller
from localrl.processes.child import Restart
from localrl.records import Example, Group, Leaf, MemoryPlan, Node, ScoredGroup
from localrl.rewards.scoring import Tally
from localrl.rollouts.forking import EntropyRule, PeriodicRule, Spacing
from localrl.rollouts.groups import Shape
from localrl.rollouts.replay import Replay, ReplayCounts, Stored
from localrl.rollouts.reuse import CompletionCache
from localrl.runs.checkpoints import Checkpoints
from localrl.runs.folder import STEP_LOGS, RunFolder, reopen_run
from localrl.tasks.base import Task
from localrl.utils.codec import decode, encode, from_bytes, to_bytes

if TYPE_CHECKING:
    from localrl.training.session import Session

TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Choice,
        CompletionCache,
        EntropyRule,
        Evaluation,
        Example,
        Group,
        PromptStats,
        Leaf,
        MemoryPlan,
        Node,
        PeriodicRule,
        Replay,
        ReplayCounts,
        ScoredGroup,
        Shown,
        Spacing,
        Stored,
        Tally,
        Tracker,
        MemoryMonitor,
    )
}
"""Every record type that a state may hold."""
RENAMED = {"Earlier": CompletionCache, "Known": PromptStats, "Watch": MemoryMonitor}
"""Record types under the names that older checkpoints use."""

MAY_CHANGE = (
    "run.steps",
    "run.minutes",
    "run.eval_every",
    "run.checkpoint_every",
    "run.keep_every",
    "run.report_to",
    "run.rollout_log_limit",
    "task.reward_timeout_s",
    "task.reward_memory_mb",
    "task.tool_timeout_s",
    "model.selfcheck",
)
"""Settings that may change when a run is resumed: none of them changes the result of a step."""

VALUES, RECORDS, WEIGHTS = "state.json", "records.safetensors", "weights.safetensors"
ADAPTER, OPTIMIZER = "adapter/", "optimizer/"


@dataclass(frozen=True, eq=False)
class State:
    """The state of a run between two steps."""

    step: int
    """Number of steps done."""
    values: Mapping[str, Any]
    """Values that `encode` can store, by name."""
    weights: Mapping[str, mx.array]
    """Adapters and optimizer, by `adapter/<name>` and `optimizer/<name>`."""


def capture(session: Session, step: int) -> State:
    """Return the state after a step. Cheap: only copies what will change in place."""
    sampler, updater = session.sampler, session.updater
    values = {
        "tokens": session.tokens,
        "trained_s": session.trained_s,
        "unrewarded": session.unrewarded,
        "evaluation_s": session.forecast.evaluation_s,
        "evaluations": dict(session.evaluations),
        "plan": session.plan,
        "watch": copy.copy(session.watch),
        "peak_bytes": session.peak_bytes,
        "sources": session.sources,
        "offsets": session.run.sizes(),
        "tracker": copy.deepcopy(session.tracker),
        "rule": copy.deepcopy(sampler.rule),
        "replays": sampler.replays.copy(),
        "earlier": sampler.earlier.copy(),
        "rescored_tokens": sampler.rescored_tokens,
        "rewards": session.scorer.tallies(),
        "updates": updater.updates,
        "skipped": updater.skipped,
        "shared": updater.shared,
        "kernels": session.policy.engine.kernels,
    }
    flat: Any = {
        ADAPTER: tree_flatten(session.policy.model.trainable_parameters()),
        OPTIMIZER: tree_flatten(updater.optimizer.state),
    }
    weights = {f"{part}{name}": array for part, pairs in flat.items() for name, array in pairs}
    return State(step, values, weights)


def write(state: State, checkpoints: Checkpoints) -> Path:
    """Publish a state as the checkpoint of its step.

    Raises: CheckpointError if it is not finite or cannot be written.
    """
    flat = mx.stack([mx.isfinite(array).all() for array in state.weights.values()])
    if not flat.all().item():
        raise CheckpointError(f"The weights after step {state.step} are not finite; not saved.")
    tree, arrays = encode(dict(state.values), TYPES)
    records = {name: mx.array(array) for name, array in arrays.items()}
    text = json.dumps({"step": state.step, "values": tree}).encode()
    size = len(text) + sum(a.nbytes for a in (*records.values(), *state.weights.values()))
    files = {
        VALUES: lambda path: _write_bytes(path, text),
        WEIGHTS: lambda path: mx.save_safetensors(str(path), dict(state.weights)),
    }
    if records:
        files[RECORDS] = lambda path: mx.save_safetensors(str(path), records)
    return checkpoints.save(state.step, files, size)


def read(folder: Path) -> State:
    """Read the state in an intact checkpoint.

    Raises: CheckpointError if another version of localrl wrote it.
    """
    tree = json.loads((folder / VALUES).read_bytes())
    records = folder / RECORDS
    arrays = _load(records) if records.exists() else {}
    values = decode(
        tree["values"], {name: np.array(a) for name, a in arrays.items()}, TYPES | RENAMED
    )
    return State(tree["step"], values, _load(folder / WEIGHTS))


def restore(state: State, session: Session) -> None:
    """Restore a state into a session that was just opened.

    Raises: CheckpointError if its model or its data differ from the session's.
    """
    for name, was in state.values["sources"].items():
        if session.sources[name] != was:
            raise CheckpointError(
                f"The {name} of this run has changed since its checkpoint. Put it back, or start a "
                "new run (--adapter starts from this run's adapter)."
            )
    values, sampler, updater = state.values, session.sampler, session.updater
    adapter, optimizer = _part(state, ADAPTER), _part(state, OPTIMIZER)
    session.policy.model.load_weights(list(adapter.items()), strict=False)
    updater.optimizer.init(session.policy.model.trainable_parameters())
    updater.optimizer.state = tree_unflatten(list(optimizer.items()))
    mx.eval(session.policy.model.trainable_parameters(), updater.optimizer.state)
    updater.updates, updater.skipped = values["updates"], values["skipped"]
    updater.shared = values["shared"]
    session.tokens, session.trained_s = values["tokens"], values["trained_s"]
    session.unrewarded = values.get("unrewarded", 0)
    session.evaluations = dict(values["evaluations"])
    session.forecast.evaluation_s = values.get("evaluation_s", 0.0)  # not in older checkpoints
    if base := session.evaluations.get(0):
        session.held_out = session.held_out[: len(base.passed) or None]
    # In place, because the sampler uses the same tracker.
    vars(session.tracker).update(vars(values["tracker"]))
    sampler.rule = values["rule"]
    sampler.replays, sampler.earlier = values["replays"], values["earlier"]
    sampler.rescored_tokens = values["rescored_tokens"]
    session.scorer.restore(values["rewards"])
    session.watch, session.peak_bytes = values["watch"], values["peak_bytes"]
    _compute_as(values.get("kernels"), session)


def _compute_as(kernels: Choice | None, session: Session) -> None:
    """Use the state's kernels in C, since others round differently; warn if they are missing."""
    engine = session.policy.engine
    if kernels is None or engine.kernels is None:
        return
    try:
        engine.use_kernels(kernels)
    except ConfigError as error:
        session.progress.warn(
            f"{error} The run continues with {engine.kernels}: its numbers will differ in the "
            "last digits from those of the machine it began on."
        )


def broadcast(session: Session) -> None:
    """Give every rank the state of rank 0, after checking that model and data are the same.

    Raises: CheckpointError if they are not; ConfigError if the adapters to start from differ.
    """
    ranks, own = session.ranks, session.watch
    lora = vars(session.config.lora)
    first = json.loads(ranks.broadcast(json.dumps(lora).encode()))
    if json.loads(json.dumps(lora)) != first:
        raise ConfigError(
            f"Rank {ranks.rank} starts from an adapter with {lora}, rank 0 from one with {first}. "
            "Put the same adapter on every machine."
        )
    state = capture(session, session.step)
    arrays = {name: np.array(array) for name, array in state.weights.items()}
    told = ranks.broadcast(to_bytes([state.step, dict(state.values), arrays], TYPES))
    if ranks.is_main:
        return
    step, values, arrays = from_bytes(told, TYPES)
    weights = {name: mx.array(array) for name, array in arrays.items()}
    # Reward tallies are summed over ranks; memory and processor belong to each machine.
    restore(State(step, values | {"rewards": {}, "watch": own, "kernels": None}, weights), session)
    session.step = step


def _part(state: State, prefix: str) -> dict[str, mx.array]:
    return {
        name.removeprefix(prefix): array
        for name, array in state.weights.items()
        if name.startswith(prefix)
    }


def _load(path: Path) -> dict[str, mx.array]:
    loaded: Any = mx.load(str(path))
    # Evaluate now, because the file may be pruned before the arrays are first used.
    mx.eval(loaded)
    return loaded


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


@dataclass(frozen=True, eq=False)
class PreviousRun:
    """The run of an earlier process, locked."""

    run: RunFolder
    state: State | None
    """The state of its newest checkpoint; None if it has none: then the run starts over."""
    changed: Mapping[str, tuple[Any, Any]]
    """Settings whose values have changed."""

    @property
    def plan(self) -> MemoryPlan | None:
        """The plan of its last checkpoint."""
        return self.state.values["plan"] if self.state else None

    def plan_after(self, restart: Restart | None, shape: Shape) -> MemoryPlan | None:
        """Return the plan to continue with: the run's, or what the last supervised process left."""
        if restart is None:
            return self.plan
        plan = MemoryPlan(**json.loads((self.run.path / "plan.json").read_bytes()))
        least_rows = shape.leaves if shape.leaves > shape.roots else 1
        return smaller(plan, least_rows=least_rows) if restart.smaller else plan

    def continue_in(self, session: Session) -> None:
        """Continue the run in this session, and cut logs written after its checkpoint.

        Raises: CheckpointError if it cannot be continued.
        """
        step = 0
        if self.state is not None:
            restore(self.state, session)
            step = self.state.step
        self.run.cut(self.state.values["offsets"] if self.state else dict.fromkeys(STEP_LOGS, 0))
        session.step = step
        changed = {key: {"was": old, "is": new} for key, (old, new) in self.changed.items()}
        self.run.event("resumed", step=step, changed=changed)


def sources_of(model_folder: Path, task: Task, held_out: Sequence[Example]) -> dict[str, str]:
    """Return SHA-256 hashes of a run's sources: the model's files by name and size, and its
    data."""
    weights = sorted((p.name, p.stat().st_size) for p in model_folder.glob("*.safetensors"))
    model = (model_folder / "config.json").read_bytes() + repr(weights).encode()
    examples = [*map(task.train, range(task.train_size)), *held_out]
    rows = [[e.id, list(map(dict, e.messages)), repr(e.answer)] for e in examples]
    data = json.dumps([task.name, rows]).encode()
    return {"model": hashlib.sha256(model).hexdigest(), "data": hashlib.sha256(data).hexdigest()}


@contextmanager
def reopen(config: RunConfig, warn: Callable[[str], None]) -> Iterator[PreviousRun]:
    """Reopen the run in `config.run.out`, locked, with its newest intact state.

    Raises: ConfigError if there is none, another process uses it, or settings have changed that
    must not; CheckpointError if all its checkpoints are damaged.
    """
    folder = Path(config.run.out or "")
    with reopen_run(folder, rollout_log_limit=config.run.rollout_log_limit) as run:
        changed = changed_settings(RunConfig.of_run(folder / "config.toml"), config)
        checkpoints = Checkpoints(folder / "checkpoints", warn)
        checkpoints.sweep()
        newest = checkpoints.newest()
        yield PreviousRun(run, read(newest) if newest else None, changed)


def changed_settings(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by key.

    Raises: ConfigError if one of them would make it a different run.
    """
    changed = {
        key: (was, now)
        for key in keys()
        if key != "run.out" and (was := old.value(key)) != (now := new.value(key))
    }
    wrong = {key: pair for key, pair in changed.items() if key not in MAY_CHANGE}
    if wrong:
        told = "; ".join(f"{key} was {was!r} and is {now!r}" for key, (was, now) in wrong.items())
        raise ConfigError(
            f"A resumed run keeps its settings, but {told}. Leave them out, or start a new run. "
            f"Settings that may change: {', '.join(MAY_CHANGE)}."
        )
    return changed
