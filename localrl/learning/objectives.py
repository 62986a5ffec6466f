"""Objectives by name: each paper's choices as one record, and their effect on weights and Z.

The loss of a step is a sum over tokens, divided once:

    L = 1/Z sum_t [ -s_t(r_t, c_t) + w_t KL_t ],   c_t = share_t * A_t,   w_t = kl_coef * share_t

share_t is the weight of the token: omega, its share of its prompt, possibly over a length. All but
the surrogate s and the KL is known before the update, and is folded into c, w and Z. In a step's
first update every ratio r is exactly 1, in any precision, since it is taken to that update's own
log-probabilities: objectives that differ only in the ratio (grpo and gspo, dapo and cispo, clipped
and rloo) then have the same gradient, in their papers and here, and differ from the step's second
update on. What the sampler computed differently is a weight of c, see `objective.policy_sums`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from localrl.errors import ConfigError
from localrl.learning.credit import Credit
from localrl.learning.weighting import effective_weight, prompt_weight
from localrl.records import Group, ScoredGroup
from localrl.settings import LearningConfig

Length = Literal["constant", "sequence", "group", "step"]
"""Divisor of the sums: the configured length of a completion, the tokens of each completion, of
each prompt's completions, or of all completions of the step."""

Ratio = Literal["token", "sequence", "weight", "none"]
"""Use of the ratio: clipped per token; clipped per completion; clipped, without gradient, as a
weight of the log-probability; or not computed at all."""


DIFFICULTIES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
"""Success rates for which `describe` gives the prompt weighting."""


@dataclass(frozen=True)
class Objective:
    """The choices in which policy-gradient losses differ."""

    prompt_weight: str
    """Name from `localrl.learning.weighting`; it determines the baseline and the scale."""
    length: Length
    ratio: Ratio
    clip_low: float
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float
    """The ratio is clipped above at 1 + clip_high."""
    kl_coef: float = 0.0
    kl_estimator: str = "k3"

    @property
    def flat_only(self) -> bool:
        """True if completions must not share tokens."""
        return self.length == "sequence" or self.ratio == "sequence"


OBJECTIVES: dict[str, Objective] = {
    # PPO's clip, leave-one-out, constant length: unbiased in prompts and lengths, and the default.
    "clipped": Objective("none", "constant", "token", 0.2, 0.28),
    # Shao et al. 2024 (2402.03300)
    "grpo": Objective("std", "sequence", "token", 0.2, 0.2),
    # Liu et al. 2025 (2503.20783)
    "dr_grpo": Objective("mean", "constant", "token", 0.2, 0.2),
    # TRL's loss of this name
    "bnpo": Objective("std", "step", "token", 0.2, 0.2),
    # Yu et al. 2025 (2503.14476)
    "dapo": Objective("std", "group", "token", 0.2, 0.28),
    # MiniMax 2025 (2506.13585), with its weight clipped at 5 as in Khatri et al. 2025 (2510.13786)
    "cispo": Objective("std", "group", "weight", 1.0, 4.0),
    # Zheng et al. 2025 (2507.18071)
    "gspo": Objective("std", "sequence", "sequence", 3e-4, 4e-4),
    # Ahmadian et al. 2024 (2402.14740)
    "rloo": Objective("none", "constant", "none", 0.0, 0.0),
}
"""Objectives by name. Clip ranges are the papers' own, or PPO's 0.2 if a paper gives none."""
SUPERVISED = Objective("none", "step", "none", 0.0, 0.0)
"""The objective of given completions: with advantages of 1 it is their mean negative log-likelihood
per token. No paper's, and no choice of `learning.objective`: it is set by `task.demonstrations`."""


def make_objective(config: LearningConfig, *, supervised: bool = False) -> Objective:
    """Build the configured objective; explicit settings override the paper's choices.

    supervised: True for that of given completions, of which only the KL is configured.

    Raises: ConfigError if a clip range is given for an objective without a ratio.
    """
    kl = {"kl_coef": config.kl_coef, "kl_estimator": config.kl_estimator}
    if supervised:
        return dataclasses.replace(SUPERVISED, **kl)
    objective = OBJECTIVES[config.objective]
    given = {
        name: value
        for name in ("prompt_weight", "clip_low", "clip_high")
        if (value := getattr(config, name)) is not None
    }
    useless = [name for name in given if name.startswith("clip")]
    if objective.ratio == "none" and useless:
        raise ConfigError(
            f"learning.{useless[0]} is {given[useless[0]]}, but {config.objective} has no ratio "
            "to clip. Leave it out or set learning.objective to clipped."
        )
    return dataclasses.replace(objective, **given, **kl)


def describe(
    config: LearningConfig, group_size: int, *, supervised: bool = False
) -> dict[str, Any]:
    """Describe the objective in full, with the effect of its prompt weighting by difficulty.

    `effective_weight` is w(p) of a flat group: a prompt with success probability p moves the policy
    by w(p) times its own gradient. None if groups have a single completion.
    """
    objective = make_objective(config, supervised=supervised)
    weights = None
    if group_size > 1 and not supervised:
        weights = {
            str(p): round(effective_weight(objective.prompt_weight, p, group_size), 3)
            for p in DIFFICULTIES
        }
    return {
        "name": "supervised" if supervised else config.objective,
        **dataclasses.asdict(objective),
        "effective_weight": weights,
    }


def weigh_prompt(objective: Objective, scored: ScoredGroup, credit: Credit) -> Credit:
    """Multiply all advantages of the group by the objective's prompt weight."""
    known = [reward for reward in scored.rewards if reward is not None]
    factor = prompt_weight(objective.prompt_weight, known)
    advantages = tuple(None if a is None else factor * a for a in credit.advantages)
    return dataclasses.replace(credit, advantages=advantages)


def token_shares(objective: Objective, group: Group, credit: Credit) -> tuple[float, ...]:
    """Weight of one token of each node.

        constant: omega      sequence: omega / |y|      group: omega / T      step: omega G

    G is the number of the prompt's completions and T their mean length: the sum of omega over the
    tokens that the model wrote. In a flat group omega is 1/G, so "group" gives every token 1 over
    the prompt's tokens, and "step" gives it 1.

    Raises: ConfigError if the objective needs |y| and completions share tokens.
    """
    if objective.flat_only:
        _refuse_forks(group)
    if objective.length == "group":
        mean = _mean_length(group, credit)
        return tuple(omega / mean if mean > 0 else 0.0 for omega in credit.weights)
    if objective.length == "sequence":
        lengths = _completion_lengths(group)
        return tuple(w / max(1, n) for w, n in zip(credit.weights, lengths, strict=True))
    if objective.length == "step":
        return tuple(omega * _completions(group, credit) for omega in credit.weights)
    return credit.weights


def denominator(
    objective: Objective,
    scored: Sequence[ScoredGroup],
    credits: Sequence[Credit],
    max_completion_tokens: int,
) -> float:
    """Compute Z of a step from all its groups, informative or not.

        constant: prompts * max_completion_tokens    sequence, group: prompts    step: sum of G T

    The last is the number of tokens. Completions without a reward have no omega and count neither
    in G nor in T.
    """
    if objective.length == "step":
        pairs = zip(scored, credits, strict=True)
        return float(sum(_completions(g.group, c) * _mean_length(g.group, c) for g, c in pairs))
    if objective.length == "constant":
        return float(len(scored) * max_completion_tokens)
    return float(len(scored))


def _completions(group: Group, credit: Credit) -> int:
    return sum(credit.weights[leaf.node] > 0 for leaf in group.leaves)


def _mean_length(group: Group, credit: Credit) -> float:
    pairs = zip(group.nodes, credit.weights, strict=True)
    return float(sum(omega * int(node.sampled.sum()) for node, omega in pairs))


def _completion_lengths(group: Group) -> list[int]:
    """Length |y| of the completion each node belongs to: the tokens that the model wrote."""
    lengths = [0] * len(group.nodes)
    for leaf in group.leaves:
        nodes = group.nodes_of(leaf)
        written = sum(int(group.nodes[n].sampled.sum()) for n in nodes)
        for n in nodes:
            lengths[n] = written
    return lengths


def _refuse_forks(group: Group) -> None:
    parents = [node.parent for node in group.nodes if node.parent >= 0]
    if len(set(parents)) < len(parents):
        flexible = [name for name, objective in OBJECTIVES.items() if not objective.flat_only]
        raise ConfigError(
            f"Completions of {group.example.id} share tokens, and this learning.objective divides "
            "by the length of the one completion a token belongs to. Sample flat groups, or set "
            f"it to one of {', '.join(flexible)}."
        )
