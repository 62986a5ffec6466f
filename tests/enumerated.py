"""A policy whose completions can all be listed, so that its expected reward's gradient is exact.

Four tokens, one prompt, and completions of at most five tokens. Estimates of the gradient come from
the loop's own stages: sampler, rewards, credit, selection, and the update's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from localrl import RunConfig
from localrl.backend import mx, nn, tree_flatten
from localrl.processes.heartbeat import Heartbeat
from localrl.records import Example, Group, ScoredGroup
from localrl.training.session import NullProgress, Session
from localrl.training.setup import open_session

LONGEST = 5
END, SPACE, A, S = range(4)
PROMPT = "a"
SETTINGS = {
    "task.eval_prompts": 0,
    "rollout.max_completion_tokens": LONGEST,
    "rollout.prompts_per_step": 1,
    "lora.rank": 2,
    "memory.decode_rows": 4096,
    "memory.micro_rows": 512,
}
REWARD = "def reward(completion_ids):\n    return [3 not in ids for ids in completion_ids]\n"
"""1 for a completion without the last of the four tokens, else 0."""


PAIRS = {"rollout.group_size": 2}
TREE = {"rollout.strategy": "tree", "rollout.group_size": 4}
ENTROPY = {"rollout.fork_rule": "entropy"}
FRESH: dict[str, dict[str, Any]] = {
    "flat": {"rollout.group_size": 4},
    "pairs": PAIRS,
    "single": {"rollout.group_size": 1},
    "tree by entropy": TREE | ENTROPY,
    "tree by period": TREE,
    "adaptive": {"rollout.strategy": "adaptive", "rollout.group_size": 4},
    "early ends": PAIRS | {"rollout.stop_text": "aa"},
    "small advantages": PAIRS | {"learning.min_advantage": 0.5},
}
"""Strategies for new groups."""
REUSE = PAIRS | {"rollout.reuse": 0.5}


def stop_of(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens of the text that ends a completion."""
    return (A,) * len(settings.get("rollout.stop_text", ""))


def make_files(folder: Path) -> Path:
    """Write the model, its rewards and prompts for opening a session."""
    tiny.make_folder(
        folder / "model",
        bits=None,
        template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
        special=("<end>",),
        characters=" as",
        eos_token_id=END,
        vocab_size=4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    (folder / "reward.py").write_text(REWARD)
    rows = [f'{{"prompt": "{prompt}", "answer": ""}}\n' for prompt in ("a", "s", "as", "sa")]
    (folder / "rows.jsonl").write_text("".join(rows))
    return folder


@contextmanager
def opened(files: Path, out: Path, settings: Mapping[str, Any]) -> Iterator[Session]:
    """Open a session on the model, with adapters that do something and a tracker that knows
    something."""
    config = RunConfig.create(
        {
            "model.path": str(files / "model"),
            "task.name": str(files / "rows.jsonl"),
            "task.rewards": f"{files / 'reward.py'}:reward",
            "run.out": str(out),
            **SETTINGS,
            **settings,
        }
    )
    opening = open_session(
        config, overwrite=False, resume=False, progress=NullProgress(), heartbeat=Heartbeat()
    )
    with opening as session:
        tiny.stir(session.policy.model, 0, 0.4)
        learn(session, 0, session.sampler.collect(0, examples(0, 20), 0))
        yield session


def examples(step: int, count: int) -> list[Example]:
    """Return prompts with the same tokens; each is an example of its own."""
    messages = ({"role": "user", "content": PROMPT},)
    return [Example(id=f"{step}-{i}", messages=messages) for i in range(count)]


def learn(session: Session, step: int, scored: Sequence[ScoredGroup]) -> None:
    """Let tracker and sampler learn from groups, as after a step that changed no weight."""
    credits = [session.credit(step, group) for group in scored]
    session.tracker.update(scored, credits)
    session.sampler.learn(scored)


@dataclass(frozen=True)
class Block:
    """Groups of one step to estimate the gradient from."""

    scored: Sequence[ScoredGroup]
    step: int
    prompts: int
    """Number of prompts sampled for them."""
    factor: float = 1.0
    """The documented factor on the gradient."""


def fresh(session: Session, blocks: int, prompts: int) -> Iterator[Block]:
    """Yield new groups; the factor is the share of the planned roots that came."""
    for step in range(1, blocks + 1):
        scored = session.sampler.collect(step, examples(step, prompts), step)
        roots = sum(node.parent < 0 for group in scored for node in group.group.nodes)
        yield Block(scored, step, prompts, roots / prompts / session.sampler.shape.planned_roots)
        learn(session, step, scored)


def reused(session: Session, blocks: int, prompts: int) -> Iterator[Block]:
    """Yield groups of prompts that are visited for the second time."""
    for step in range(1, 2 * blocks, 2):
        seen = examples(step, prompts)
        learn(session, step, session.sampler.collect(step, seen, step))
        scored = session.sampler.collect(step + 1, seen, step + 1)
        yield Block(scored, step + 1, prompts)
        learn(session, step + 1, scored)


def estimate(session: Session, block: Block) -> np.ndarray:
    """Estimate the gradient of the expected reward times the block's factor, (P,)."""
    credits = [session.credit(block.step, group) for group in block.scored]
    batch = session.select(block.step, block.scored, credits).batch
    found = flattened(session.updater.gradient(batch, session.plan)[0])
    # Divided by all prompts, also by those of which nothing came back.
    return -LONGEST * len(block.scored) / block.prompts * found


def cut_anywhere(
    now: np.ndarray, written: np.ndarray, uniforms: np.ndarray, rounding: np.ndarray | None
) -> int:
    """Replace `reuse.accepted` by a length that does not depend on the text: exact, if wasteful."""
    return min(int((LONGEST + 1) * uniforms[0]), len(now))


def with_learned(session: Session, block: Block) -> Block:
    """Return the block with what the tracker expects now that it has learned these rewards."""

    def changed(group: Group) -> Group:
        value = session.tracker.value(group.example.tracker_key)
        nodes = tuple(replace(node, expected_reward=value) for node in group.nodes)
        return replace(group, nodes=nodes)

    scored = [replace(one, group=changed(one.group)) for one in block.scored]
    return replace(block, scored=scored)


def completions(stop: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """List all completions; `stop` is a run of tokens that ends one."""
    found: list[tuple[int, ...]] = []
    running: list[tuple[int, ...]] = [()]
    for length in range(1, LONGEST + 1):
        longer = [(*one, token) for one in running for token in range(4)]
        running = []
        for one in longer:
            stopped = bool(stop) and one[-len(stop) :] == tuple(stop)
            ends = one[-1] == END or stopped or length == LONGEST
            (found if ends else running).append(one)
    return found


def padded(listed: Sequence[Sequence[int]]) -> tuple[np.ndarray, mx.array]:
    """Return completions as ids (N, LONGEST), and a mask of that shape: 1 for each token."""
    ids = np.array([[*one, *[END] * (LONGEST - len(one))] for one in listed], np.int32)
    lengths = np.array([[len(one)] for one in listed])
    return ids, mx.array((np.arange(LONGEST) < lengths).astype(np.float32))


def all_logprobs(session: Session, prompt: str, ids: np.ndarray) -> mx.array:
    """Compute all log-probabilities (N, LONGEST, V) behind the prefixes of ids (N, LONGEST)."""
    begun = np.array(session.policy.tokenizer.encode_text(prompt), np.int32)
    tokens = np.concatenate([np.tile(begun, (len(ids), 1)), ids[:, :-1]], axis=1)
    logits = session.policy.model(mx.array(tokens)).astype(mx.float32)[:, -LONGEST:]
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def exact_gradient(
    model: Any, stop: Sequence[int] = (), begun: tuple[int, ...] = ()
) -> tuple[np.ndarray, float]:
    """Compute the gradient (P,) of the expected reward by the adapters, and that reward.

    begun: tokens that completions begin with, which are given and not drawn.
    """
    listed = [one for one in completions(stop) if one[: len(begun)] == begun]
    ids = np.array([[A, *one, *[END] * (LONGEST - len(one))] for one in listed], np.int32)
    lengths = np.array([[len(one)] for one in listed])
    places = np.arange(LONGEST)
    mask = mx.array(((len(begun) <= places) & (places < lengths)).astype(np.float32))
    rewards = mx.array(np.array([S not in one for one in listed], np.float32))
    tokens = mx.array(ids)

    def expected() -> mx.array:
        logits = model(tokens[:, :-1]).astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
        return (mx.exp((chosen * mask).sum(axis=-1)) * rewards).sum()

    value, gradient = nn.value_and_grad(model, expected)()
    return flattened(gradient), value.item()


def flattened(gradient: Any) -> np.ndarray:
    """Join a tree of arrays into one vector, by name."""
    pairs: Any = tree_flatten(gradient)
    return np.concatenate([np.array(array).ravel() for _, array in sorted(pairs)])


@dataclass(frozen=True)
class Measured:
    """An estimator beside the exact gradient, from independent estimates."""

    scale: float
    """Component along the exact gradient, relative to it and to the documented factor."""
    scale_se: float
    across: float
    """Squared component across it, relative to the square of the one along it."""
    across_se: float
    """If there is none."""

    @classmethod
    def of(cls, found: Sequence[tuple[np.ndarray, float]], exact: np.ndarray) -> Measured:
        """Compare B estimates (P,) with their factors times the gradient (P,)."""
        rows = np.array([estimate for estimate, _ in found], np.float64)
        factors, exact = np.array([factor for _, factor in found]), exact.astype(np.float64)
        scales = rows @ exact / (exact @ exact)
        along, factor = scales.mean(), factors.mean()
        rest = rows - scales[:, None] * exact
        # Products of different estimates: their noise does not add to the square.
        pairs = (rest @ rest.T)[np.triu_indices(len(rows), k=1)] / (along**2 * (exact @ exact))
        # Of a ratio of means, whose two parts may vary together.
        noise = (scales - along / factor * factors) / factor
        return cls(
            float(along / factor),
            float(noise.std(ddof=1) / np.sqrt(len(rows))),
            float(pairs.mean()),
            float(np.sqrt((pairs**2).mean() / len(pairs))),
        )
