"""A tabular task whose gradient is known exactly, and forests sampled from it by the thousand.

Six lanes of six positions and an absorbing failure state, four tokens, 36 steps. At the decision
positions of a lane the four tokens lead to the lanes l, l+1, l-1 and l+2, with random logits.
Everywhere else one token has probability 0.97 and one of the other three is fatal. The reward is
Bernoulli, by the last lane. The policy has one logit per step, state and token.

Shapes: T steps, S states, V tokens; N forests, R rows (the most leaves one may have), K nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

LANES = 6
FAILED = LANES
STATES = LANES + 1
TOKENS = 4
STEPS = 36
DECISIONS = ((1, 4), (1,), (2, 5), (0,), (1, 4), (2,))
"""Positions, modulo 6, at which each lane branches."""
SUCCESS = np.array([0.9, 0.1, 0.05, 0.6, 0.05, 0.1, 0.0])
"""Probability of reward 1 by last state."""
MOVES = np.array([0, 1, -1, 2])
SURE = 0.97
LOGIT_SD = 0.5


@dataclass(frozen=True)
class ForkTask:
    """The policy and the dynamics, both (T, S, V)."""

    probs: np.ndarray
    next_state: np.ndarray

    @cached_property
    def entropy(self) -> np.ndarray:
        """(T, S), nats."""
        return -(self.probs * np.log(self.probs)).sum(axis=-1)

    @cached_property
    def cumulative(self) -> np.ndarray:
        """(T, S, V), for drawing by inversion."""
        return self.probs.cumsum(axis=-1)

    @cached_property
    def action_values(self) -> np.ndarray:
        """Q (T, S, V) by dynamic programming, backwards from the reward."""
        values, result = SUCCESS, np.empty(self.probs.shape)
        for t in reversed(range(STEPS)):
            result[t] = values[self.next_state[t]]
            values = (self.probs[t] * result[t]).sum(axis=-1)
        return result

    @cached_property
    def values(self) -> np.ndarray:
        """V (T, S)."""
        return (self.probs * self.action_values).sum(axis=-1)

    @property
    def value(self) -> float:
        """The expected reward J of the whole task."""
        return float(self.values[0, 0])

    @cached_property
    def gradient(self) -> np.ndarray:
        """dJ / dlogits (T, S, V) = P(state at t) * pi * (Q - V)."""
        visits = np.zeros((STEPS + 1, STATES))
        visits[0, 0] = 1.0
        for t in range(STEPS):
            np.add.at(visits[t + 1], self.next_state[t], visits[t, :, None] * self.probs[t])
        advantage = self.action_values - self.values[..., None]
        return visits[:STEPS, :, None] * self.probs * advantage


def make_task(seed: int) -> ForkTask:
    """The task with logits and fatal tokens drawn from this seed."""
    rng = np.random.default_rng(seed)
    probs = np.empty((STEPS, STATES, TOKENS))
    next_state = np.empty((STEPS, STATES, TOKENS), int)
    for t in range(STEPS):
        for state in range(STATES):
            if state != FAILED and t % 6 in DECISIONS[state]:
                weights = np.exp(LOGIT_SD * rng.standard_normal(TOKENS))
                probs[t, state] = weights / weights.sum()
                next_state[t, state] = (state + MOVES) % LANES
            else:
                sure, fatal = rng.permutation(TOKENS)[:2]
                probs[t, state] = (1 - SURE) / (TOKENS - 1)
                probs[t, state, sure] = SURE
                next_state[t, state] = state
                next_state[t, state, fatal] = FAILED
    return ForkTask(probs, next_state)


Retro = Literal["marks", "surprisal", "entropy"]


@dataclass(frozen=True)
class Plan:
    """How one forest is sampled. Every fork makes two children drawn alike."""

    roots: int
    leaves: int
    """Rows at most; a fork needs a free one. Equal to `roots`: flat."""
    gap: int = 0
    """Tokens since the last fork, or since the start, before the next one."""
    min_entropy: float = 0.5
    """Nats; 0.5 picks exactly the decision positions, 0 every position."""
    coin: float = 1.0
    """Probability of forking where everything else allows it."""
    retro: Retro | None = None
    """Fork finished root chains, twice each: at the first positions that pass the coin ("marks"),
    or at those of highest surprisal or entropy, whose ranks depend on the chain's future."""
    prune_at: tuple[int, ...] = ()
    """Steps at which rows in a state worth less than `prune_below` play roulette."""
    prune_below: float = 0.0
    survival: float = 0.25
    """Their probability to go on."""


@dataclass(frozen=True)
class Forests:
    """N forests as arrays. Nodes that do not exist are roots of weight 0 without a reward."""

    parent: np.ndarray
    """(N, K) int, -1 for a root; parents come before children."""
    cond_weight: np.ndarray
    """(N, K), as in `Node`."""
    reward: np.ndarray
    """(N, K), NaN where no completion ends or its reward is not known."""
    planned_roots: int
    node: np.ndarray
    """(T, N, R) node of the token each row wrote at each step, -1 where it wrote none."""
    state: np.ndarray
    """(T, N, R)."""
    token: np.ndarray
    """(T, N, R)."""


def sample_forests(task: ForkTask, plan: Plan, count: int, rng: np.random.Generator) -> Forests:
    """`count` independent forests of this plan."""
    if plan.retro is None:
        return _Sampler(task, plan, count, rng).run()
    chains = _Sampler(task, replace(plan, leaves=plan.roots, retro=None), count, rng).run()
    forks = _retro_forks(task, plan, chains, rng)
    return _Sampler(task, plan, count, rng).run(chains.token, forks)


def _retro_forks(
    task: ForkTask, plan: Plan, chains: Forests, rng: np.random.Generator
) -> np.ndarray:
    """Before which tokens the finished chains fork, (T, N, M) bool: twice each, where possible."""
    steps = np.arange(STEPS)[:, None, None]
    entropy = task.entropy[steps, chains.state]
    if plan.retro == "marks":
        marked = (entropy > plan.min_entropy) & (rng.random(entropy.shape) < plan.coin)
        return marked & (marked.cumsum(axis=0) <= 2)
    surprisal = -np.log(task.probs[steps, chains.state, chains.token])
    score = entropy if plan.retro == "entropy" else surprisal
    forks = np.zeros(score.shape, bool)
    highest = np.argsort(-score, axis=0, kind="stable")[:2]
    np.put_along_axis(forks, highest, True, axis=0)
    return forks


class _Sampler:
    """All forests in lock-step. At a fork the row goes on as one child, a free row as the other."""

    def __init__(self, task: ForkTask, plan: Plan, count: int, rng: np.random.Generator) -> None:
        self.task, self.plan, self.rng = task, plan, rng
        rows = plan.leaves
        nodes = rows * (2 + len(plan.prune_at))
        self.parent = np.full((count, nodes), -1)
        self.cond_weight = np.zeros((count, nodes))
        self.reward = np.full((count, nodes), np.nan)
        self.nodes_used = np.full(count, plan.roots)
        self.rows_used = np.full(count, plan.roots)
        self.cond_weight[:, : plan.roots] = 1.0
        self.node = np.full((count, rows), -1)  # (N, R), -1: no live row
        self.node[:, : plan.roots] = np.arange(plan.roots)
        self.state = np.zeros((count, rows), int)
        self.since_fork = np.zeros((count, rows), int)

    def run(self, given: np.ndarray | None = None, forks: np.ndarray | None = None) -> Forests:
        """Sample every step; the root rows repeat `given` tokens and fork as in `forks`."""
        history = []
        roots = self.plan.roots
        for t in range(STEPS):
            if t in self.plan.prune_at:
                self._prune(t)
            if forks is None:
                self._fork(self._wants(t))
            else:
                wants = np.zeros(self.node.shape, bool)
                wants[:, :roots] = forks[t]
                self._fork(wants)
            tokens = self._draw(t)
            if given is not None:
                tokens[:, :roots] = given[t]
            history.append((self.node.copy(), self.state, tokens))
            self.state = self.task.next_state[t, self.state, tokens]
            self.since_fork += 1
        forest, row = np.nonzero(self.node >= 0)
        chance = SUCCESS[self.state[forest, row]]
        self.reward[forest, self.node[forest, row]] = self.rng.random(len(chance)) < chance
        node, state, token = (np.array(record) for record in zip(*history, strict=True))
        return Forests(self.parent, self.cond_weight, self.reward, roots, node, state, token)

    def _wants(self, t: int) -> np.ndarray:
        """Live rows that would fork before this token, from what has been generated so far."""
        spaced = (self.node >= 0) & (self.since_fork >= max(self.plan.gap, 1))
        uncertain = self.task.entropy[t, self.state] > self.plan.min_entropy
        return spaced & uncertain & (self.rng.random(self.node.shape) < self.plan.coin)

    def _fork(self, wants: np.ndarray) -> None:
        free = self.node.shape[1] - self.rows_used
        order = wants.cumsum(axis=1)  # first rows first
        forest, row = np.nonzero(wants & (order <= free[:, None]))
        nth = order[forest, row] - 1
        other = self.rows_used[forest] + nth
        child = self.nodes_used[forest] + 2 * nth
        for node in (child, child + 1):
            self.parent[forest, node] = self.node[forest, row]
            self.cond_weight[forest, node] = 0.5
        self.node[forest, row], self.node[forest, other] = child, child + 1
        self.state[forest, other] = self.state[forest, row]
        self.since_fork[forest, row] = self.since_fork[forest, other] = 0
        forks = np.bincount(forest, minlength=len(self.rows_used))
        self.rows_used += forks
        self.nodes_used += 2 * forks

    def _prune(self, t: int) -> None:
        """Survivors go on in a node of weight 1/s; the others end with reward 0."""
        worth = self.task.values[t, self.state]
        forest, row = np.nonzero((self.node >= 0) & (worth < self.plan.prune_below))
        lives = self.rng.random(len(forest)) < self.plan.survival
        ended = forest[~lives], row[~lives]
        self.reward[ended[0], self.node[ended]] = 0.0
        self.node[ended] = -1
        forest, row = forest[lives], row[lives]
        first = np.searchsorted(forest, forest)  # sorted: nonzero goes forest by forest
        child = self.nodes_used[forest] + np.arange(len(forest)) - first
        self.parent[forest, child] = self.node[forest, row]
        self.cond_weight[forest, child] = 1 / self.plan.survival
        self.node[forest, row] = child
        self.nodes_used += np.bincount(forest, minlength=len(self.nodes_used))

    def _draw(self, t: int) -> np.ndarray:
        """(N, R) tokens by inverting the cumulative distribution."""
        bounds = self.task.cumulative[t, self.state][..., :-1]
        return (self.rng.random(self.state.shape)[..., None] > bounds).sum(axis=-1)
