"""Measure gradient estimators on forests of rollouts against an exactly known gradient.

`python benchmarks/estimators.py` prints the tables of estimators.md and writes that file; it takes
a minute or two on one core. For every estimator: the tokens it generates per group, its scale on
the true gradient, how far its direction is off, and its cost, tokens * Var / |E|^2: the generated
tokens that buy a gradient with a signal-to-noise ratio of 1.

Shapes as in fork_task.py: T steps, S states, V tokens; N forests, R rows, K nodes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from forest_credit import Recipe, leaf_uniform, own_leaves, shipped, treepo, treerl
from fork_task import STATES, TOKENS, Forests, ForkTask, Plan, make_task, sample_forests

TASK_SEEDS = (0, 1)
BLOCKS, BLOCK_SIZE = 40, 1000
PAGE = Path(__file__).with_suffix(".md")
MARKER = "<!-- Everything below is written by estimators.py. -->"


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    name: str
    plan: Plan
    recipe: Recipe
    unbiased: bool = True


TREE = Plan(roots=1, leaves=8, gap=10)
WIDE = Plan(roots=2, leaves=16, gap=8)
EARLY = Plan(roots=2, leaves=8, gap=4)
PERIODIC = Plan(roots=1, leaves=8, gap=10, min_entropy=0.0, coin=0.5)
MARKS = Plan(roots=2, leaves=6, retro="marks", coin=0.4)
SURPRISAL = Plan(roots=2, leaves=6, retro="surprisal")
ENTROPY = Plan(roots=2, leaves=6, retro="entropy")
HOPELESS = Plan(roots=2, leaves=16, gap=8, prune_at=(12, 24), prune_below=0.01)
DOUBTFUL = Plan(roots=2, leaves=16, gap=8, prune_at=(12, 24), prune_below=0.25, survival=0.5)

ARMS = {
    "flat-8": Arm("flat G=8, leave-one-out", Plan(8, 8), shipped(0)),
    "flat-2": Arm("flat G=2, leave-one-out", Plan(2, 2), shipped(0)),
    "flat-1": Arm("flat G=1, tracker", Plan(1, 1), shipped(4)),
    "tree-early": Arm("tree M1 L8, gap 4, kappa 1", Plan(1, 8, gap=4), shipped(1)),
    "tree-kappa-1": Arm("tree M1 L8, gap 10, kappa 1", TREE, shipped(1)),
    "tree": Arm("tree M1 L8, gap 10, kappa 4", TREE, shipped(4)),
    "tree-wrong": Arm("same, tracker wrong by +0.2", TREE, shipped(4, shift=0.2)),
    "periodic": Arm("same, periodic forks (coin 0.5)", PERIODIC, shipped(4)),
    "wide": Arm("tree M2 L16, gap 8, kappa 4", WIDE, shipped(4)),
    "wide-wrong": Arm("same, tracker wrong by +0.2", WIDE, shipped(4, shift=0.2)),
    "hopeless": Arm("tree M2 L16 with roulette where V < 0.01", HOPELESS, shipped(4)),
    "doubtful": Arm("tree M2 L16 with roulette where V < 0.25", DOUBTFUL, shipped(4)),
    "siblings": Arm("tree M2 L8, gap 4, siblings only (kappa 0)", EARLY, shipped(0)),
    "marks": Arm("retro 2,2,1: random marks, kappa 1", MARKS, shipped(1)),
    "own": Arm("tree M2 L8, gap 4, V(child) - V(parent)", EARLY, own_leaves, False),
    "uniform": Arm("tree M2 L8, gap 4, leaf-uniform", EARLY, leaf_uniform, False),
    "treepo": Arm("tree M2 L8, gap 4, TreePO's advantage", EARLY, treepo, False),
    "treerl": Arm("tree M2 L8, gap 4, TreeRL's advantage", EARLY, treerl, False),
    "surprisal": Arm("retro 2,2,1: top surprisal, kappa 1", SURPRISAL, shipped(1), False),
    "entropy": Arm("retro 2,2,1: top entropy, kappa 1", ENTROPY, shipped(1), False),
    "surprisal-treerl": Arm(
        "retro 2,2,1: top surprisal, TreeRL's advantage", SURPRISAL, treerl, False
    ),
}


UNBIASED = tuple(name for name, arm in ARMS.items() if arm.unbiased)


@dataclass(frozen=True)
class Measured:
    """What an estimator does to the gradient; `_se` are standard errors."""

    tokens: float
    """Generated per group; shared ones once."""
    scale: float
    """Component along the true gradient, as a part of it."""
    scale_se: float
    bias: float
    """Squared component across it, as a part of the squared component along it; unbiased, so
    noise makes it negative half of the time where the truth is 0."""
    bias_se: float
    """If the truth is 0."""
    cost: float
    cost_se: float

    @property
    def deviations(self) -> tuple[float, float]:
        """Scale minus 1 and squared bias, each in standard errors."""
        return (self.scale - 1) / self.scale_se, self.bias / self.bias_se


def gradients(task: ForkTask, forests: Forests, coefficients: np.ndarray) -> np.ndarray:
    """One estimate per forest: sum of coefficient * grad log pi over its tokens, (N, T*S*V)."""
    steps, count, rows = forests.node.shape
    forest = np.repeat(np.arange(count), rows).reshape(count, rows)
    result = np.empty((count, steps, STATES, TOKENS))
    for t in range(steps):
        weight = np.where(forests.node[t] >= 0, coefficients[forest, forests.node[t]], 0)
        entry = (forest * STATES + forests.state[t]) * TOKENS + forests.token[t]
        drawn = np.bincount(entry.ravel(), weight.ravel(), count * STATES * TOKENS)
        drawn = drawn.reshape(count, STATES, TOKENS)
        result[:, t] = drawn - drawn.sum(axis=-1, keepdims=True) * task.probs[t]
    return result.reshape(count, -1)


def measure(task: ForkTask, arm: Arm, *, blocks: int, block_size: int, seed: int) -> Measured:
    """Estimates from `blocks` independent blocks of forests.

    Squares of expectations are inner products of the means of two independent blocks, averaged over
    all pairs of blocks: the product of two independent halves, with less noise.
    """
    means, squares, tokens = [], [], []
    for block in range(blocks):
        forests = sample_forests(task, arm.plan, block_size, np.random.default_rng([seed, block]))
        estimates = gradients(task, forests, arm.recipe(task, forests))
        means.append(estimates.mean(axis=0))
        squares.append((estimates**2).sum(axis=1).mean())
        tokens.append((forests.node >= 0).sum() / block_size)
    return _summary(np.array(means), np.array(squares), float(np.mean(tokens)), task)


def _summary(means: np.ndarray, squares: np.ndarray, tokens: float, task: ForkTask) -> Measured:
    """From the mean estimate (B, P) and the mean squared norm (B,) of every block."""
    true = task.gradient.ravel()
    scales = means @ true / (true @ true)
    scale, scale_se = scales.mean(), _standard_error(scales)
    across = _pairs(means - scales[:, None] * true) / (scale**2 * (true @ true))
    signal = _pairs(means).mean()
    variance = squares.mean() - signal
    cost = tokens * variance / signal
    # |E|^2 is nearly all scale^2 |g|^2, so its relative error is twice the scale's.
    cost_se = cost * np.hypot(_standard_error(squares) / variance, 2 * scale_se / scale)
    return Measured(
        tokens,
        float(scale),
        float(scale_se),
        float(across.mean()),
        # Without bias the products of different pairs are uncorrelated.
        float(np.sqrt((across**2).mean() / len(across))),
        float(cost),
        float(cost_se),
    )


def _pairs(vectors: np.ndarray) -> np.ndarray:
    """Inner products of all pairs of different vectors (B, P)."""
    return (vectors @ vectors.T)[np.triu_indices(len(vectors), k=1)]


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def table(results: Mapping[str, Measured]) -> Iterator[str]:
    """Lines of a Markdown table; costs also as parts of flat-8's."""
    yield "| estimator | tokens | scale | bias | bias^2 / s.e. | cost | of flat-8 |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, result in results.items():
        scale = f"{result.scale:.3f} ± {result.scale_se:.3f}"
        across = f"{_root(result)} | {result.deviations[1]:+.1f}"
        cost = f"{result.cost:.0f} ± {result.cost_se:.0f}"
        part = f"{result.cost / results['flat-8'].cost:.2f}"
        label = ARMS[name].name if ARMS[name].unbiased else f"*{ARMS[name].name}*"
        yield f"| {label} | {result.tokens:.0f} | {scale} | {across} | {cost} | {part} |"


def _root(result: Measured) -> str:
    """The bias itself, or a bound two standard errors up where noise could explain it."""
    if result.bias > 3 * result.bias_se:
        return f"{result.bias**0.5:.3f}"
    return f"< {(max(result.bias, 0) + 2 * result.bias_se) ** 0.5:.3f}"


def main() -> None:
    began = time.process_time()
    lines = []
    for seed in TASK_SEEDS:
        task = make_task(seed)
        results = {
            name: measure(task, arm, blocks=BLOCKS, block_size=BLOCK_SIZE, seed=1000 * seed + n)
            for n, (name, arm) in enumerate(ARMS.items())
        }
        lines += [f"## Task {seed}, expected reward {task.value:.3f}", "", *table(results), ""]
    lines.append(f"{time.process_time() - began:.0f} CPU-seconds.")
    print("\n".join(lines))
    text = PAGE.read_text().partition(MARKER)[0]
    PAGE.write_text("\n".join([text + MARKER, "", *lines, ""]))


if __name__ == "__main__":
    main()
