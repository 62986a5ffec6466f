"""The state of a run between two steps: captured, written as a checkpoint, read, and restored.

It holds everything that the next step depends on: adapters, optimizer, prompt statistics, groups
kept for reuse, fork positions, the plan, and the log offsets. Random numbers need no
state: every draw is made from its address. The data cursor is the step.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localrl.backend import mx, tree_flatten, tree_unflatten
from localrl.engines.cpu.kernel_choice import Choice
from localrl.errors import CheckpointError, ConfigError
from localrl.evaluate import Evaluation, Shown
from localrl.learning.tracker import PromptStats, Tracker
from localrl.memory.adapting import MemoryMonitor
from localrl.records import Example, Group, Leaf, MemoryPlan, Node, ScoredGroup
from localrl.rewards.scoring import Tally
from localrl.rollouts.forking import EntropyRule, PeriodicRule, Spacing
from localrl.rollouts.reuse import CompletionCache
from localrl.runs.checkpoints import Checkpoints
from localrl.utils.codec import decode, encode, from_bytes, to_bytes

if TYPE_CHECKING:
    from localrl.training.components import Components
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
        ScoredGroup,
        Shown,
        Spacing,
        Tally,
        Tracker,
        MemoryMonitor,
    )
}
"""Every record type that a state may hold."""


def _spacing(gap: int = 0, **fields: Any) -> Spacing:
    """Return a spacing of forks; in older checkpoints it has a gap, which is 0: chosen."""
    return Spacing(**fields)


OLDER: dict[str, Callable[..., Any]] = {
    "Earlier": CompletionCache,
    "Known": PromptStats,
    "Watch": MemoryMonitor,
    "Spacing": _spacing,
}
"""Makers of records by the names that older checkpoints use."""

REMOVED = ("replays",)
"""Values of older checkpoints that nothing uses any more."""

VALUES, RECORDS, WEIGHTS = "state.json", "records.safetensors", "weights.safetensors"
ADAPTER, OPTIMIZER = "adapter/", "optimizer/"
ADAPTER_SOURCE = "starting adapter"
"""Name of the adapter given among the sources of a run whose KL is measured from it."""


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
        "earlier": sampler.earlier.copy(),
        "rescored_tokens": sampler.rescored_tokens,
        "rewards": session.scorer.tallies(),
        "updates": updater.updates,
        "skipped": updater.skipped,
        "shared": updater.gradient.shared,
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
    values = tree["values"]
    values["mapping"] = [pair for pair in values["mapping"] if pair[0] not in REMOVED]
    values = decode(values, {name: np.array(a) for name, a in arrays.items()}, TYPES | OLDER)
    return State(tree["step"], values, _load(folder / WEIGHTS))


def restore(state: State, session: Session) -> None:
    """Restore a state into a session that was just opened.

    Raises: CheckpointError if its model or its data differ from the session's.
    """
    check_sources(state.values["sources"], session.sources)
    values, sampler, updater = state.values, session.sampler, session.updater
    adapter, optimizer = _part(state, ADAPTER), _part(state, OPTIMIZER)
    session.policy.model.load_weights(list(adapter.items()), strict=False)
    updater.optimizer.init(session.policy.model.trainable_parameters())
    updater.optimizer.state = tree_unflatten(list(optimizer.items()))
    mx.eval(session.policy.model.trainable_parameters(), updater.optimizer.state)
    updater.updates, updater.skipped = values["updates"], values["skipped"]
    updater.gradient.shared = values["shared"]
    session.tokens, session.trained_s = values["tokens"], values["trained_s"]
    session.unrewarded = values.get("unrewarded", 0)
    session.evaluations = dict(values["evaluations"])
    session.forecast.evaluation_s = values.get("evaluation_s", 0.0)  # not in older checkpoints
    if base := session.evaluations.get(0):
        session.held_out = session.held_out[: len(base.passed) or None]
    # In place, because the sampler uses the same tracker.
    vars(session.tracker).update(vars(values["tracker"]))
    sampler.rule = values["rule"]
    sampler.earlier = values["earlier"]
    sampler.rescored_tokens = values["rescored_tokens"]
    session.scorer.restore(values["rewards"])
    session.watch, session.peak_bytes = values["watch"], values["peak_bytes"]
    _compute_as(values.get("kernels"), session)


def check_sources(was: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Check that a run's sources are those of its checkpoint.

    Raises: CheckpointError if they are not.
    """
    for name in was:
        if now.get(name) != was[name]:
            raise CheckpointError(
                f"The {name} of this run has changed since its checkpoint. Put it back, or start a "
                "new run (--adapter starts from this run's adapter)."
            )
    if ADAPTER_SOURCE in now.keys() - was.keys():
        raise CheckpointError(
            "This run's KL was measured from the model without adapters, by an earlier version of "
            "localrl; it would now be measured from the adapter that the run began with. Continue "
            "with that version, or start a new run (--adapter starts from this run's adapter)."
        )


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


def sources_of(components: Components) -> dict[str, str]:
    """Return SHA-256 hashes of a run's sources: the model's files by name and size, its data, and
    the adapter that its KL is measured from, if there is one."""
    task, model_folder = components.task, components.model_folder
    weights = sorted((p.name, p.stat().st_size) for p in model_folder.glob("*.safetensors"))
    model = (model_folder / "config.json").read_bytes() + repr(weights).encode()
    examples = [*map(task.train, range(task.train_size)), *components.held_out]
    rows = [[e.id, list(map(dict, e.messages)), repr(e.answer)] for e in examples]
    data = json.dumps([task.name, rows]).encode()
    parts = {"model": model, "data": data}
    if (given := components.demonstrations) is not None:
        ids = [[list(o.prompt_ids), o.token_ids.tolist()] for o in given.written.values()]
        parts["worked examples"] = json.dumps(ids).encode()
    if (reference := components.policy.reference) is not None:
        arrays = [np.array(array).tobytes() for _, array in sorted(reference.items())]
        parts[ADAPTER_SOURCE] = b"".join(arrays)
    return {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
