"""Produces the groups of a step: chooses prompts, samples in rounds, scores with rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from localrl.agents.agents import Agents
from localrl.config import RunConfig
from localrl.distributed.collective import ALONE, Ranks
from localrl.distributed.gather import map_sharded_groups
from localrl.learning.credit import with_expected_reward
from localrl.learning.staleness import with_scored_logprobs
from localrl.learning.tracker import Tracker
from localrl.records import Example, Group, MemoryPlan, ScoredGroup
from localrl.rollouts.adaptive import Score, collect
from localrl.rollouts.agents import AgentTurns
from localrl.rollouts.decode import Decoder
from localrl.rollouts.forking import EntropyRule, PeriodicRule, make_rule
from localrl.rollouts.groups import Shape, sample_groups
from localrl.rollouts.reuse import CompletionCache, Prefix, verify
from localrl.rollouts.turns import Turns
from localrl.tasks.base import Task
from localrl.tasks.environments import Environments
from localrl.tasks.order import take
from localrl.training.demonstrations import Demonstrations
from localrl.training.validate import check_prompt, reused_roots

Rescore = Callable[[Sequence[Group], MemoryPlan], list[list[np.ndarray]]]
"""Returns log-probabilities (n,) of every node of each group under the current policy."""


@dataclass(eq=False)
class Sampler:
    """The rollout side of a run: samples groups, and learns from them for later steps."""

    config: RunConfig
    task: Task
    plan: MemoryPlan
    decoder: Decoder
    tracker: Tracker
    shape: Shape
    score: Score
    rescore: Rescore
    environments: Environments | Agents | None = None
    """The environments that completions talk to, or the agents whose completions they are; None
    for single-turn completions."""
    ranks: Ranks = ALONE
    """The ranks that share the work."""
    demonstrations: Demonstrations | None = None
    """Completions that are given; None if they are sampled."""
    earlier: CompletionCache = field(default_factory=CompletionCache)
    rescored_tokens: int = 0
    """Number of tokens of earlier policies that were scored under a later one."""
    rule: EntropyRule | PeriodicRule | None = field(init=False)
    """The rule that decides where paths fork; None if they do not."""

    def __post_init__(self) -> None:
        self.start_rule()

    def start_rule(self) -> None:
        """Start with a new rule, as the configured shape requires."""
        self.rule = make_rule(self.config.rollout, self.shape)

    @property
    def turns(self) -> Turns | AgentTurns | None:
        """The way completions continue after a turn; None for single-turn completions."""
        if self.environments is None:
            return None
        if isinstance(self.environments, Agents):
            return AgentTurns(self.environments.begin, self.environments.answer)
        return Turns(self.environments.answer, self.config.rollout.max_turns)

    def choose(self, step: int) -> list[Example]:
        """Return the prompts of a step."""
        count = self.config.rollout.prompts_per_step
        return take(self.task, (step - 1) * count, count, self.config.run.seed)

    def collect(self, step: int, examples: Sequence[Example], version: int) -> list[ScoredGroup]:
        """Return scored groups of these examples; other ranks sample their share.

        Given completions are the same on every rank, and nothing scores them.
        """
        if self.demonstrations is not None:
            return self.demonstrations.groups(examples, version)

        def work(which: Sequence[int]) -> list[ScoredGroup]:
            return self._collect(step, [examples[i] for i in which], version)

        return map_sharded_groups(self.ranks, examples, work)

    def _collect(self, step: int, examples: Sequence[Example], version: int) -> list[ScoredGroup]:
        """Return scored groups of these examples, in as many rounds as the strategy asks for."""
        prompts = self.encode(examples)
        keys = [example.tracker_key for example in examples]
        expected = [self.tracker.expected_tokens(key) for key in keys]
        begun = self.begin(step, examples, prompts)

        def sample(which: Sequence[int], round: int) -> list[Group]:
            return sample_groups(
                self.decoder,
                [examples[i] for i in which],
                [prompts[i] for i in which],
                self.shape,
                rule=self.rule,
                max_completion_tokens=self.plan.max_completion_tokens,
                seed=self.config.run.seed,
                step=step,
                version=version,
                round=round,
                expected_tokens=[expected[i] for i in which],
                begun=[begun[i] if round == 0 else () for i in which],
                turns=self.turns,
            )

        found = collect(
            len(examples),
            self.shape,
            sample,
            self.score,
            belief=lambda i: self.tracker.posterior(keys[i]),
            place=self.tracker.place,
        )
        return self._scored_for_later(
            [
                replace(scored, group=with_expected_reward(scored.group, self.tracker.value(key)))
                for scored, key in zip(found, keys, strict=True)
            ]
        )

    def _scored_for_later(self, fresh: list[ScoredGroup]) -> list[ScoredGroup]:
        """Score fresh tokens in a forward pass, if later ones would differ from the sampler's
        record by 16-bit rounding and the groups may come back."""
        if not self.config.rollout.reuse or not self.decoder.policy.sixteen_bit:
            return fresh
        groups = [scored.group for scored in fresh]
        return [
            replace(scored, group=with_scored_logprobs(scored.group, logprobs))
            for scored, logprobs in zip(fresh, self.rescore(groups, self.plan), strict=True)
        ]

    def begin(
        self, step: int, examples: Sequence[Example], prompts: Sequence[tuple[int, ...]]
    ) -> list[Sequence[Prefix]]:
        """Return verified prefixes of earlier completions, to start each example's first ones."""
        seed = self.config.run.seed
        count = reused_roots(self.config, self.shape)
        begun: list[Sequence[Prefix]] = [()] * len(examples)
        drafts: dict[int, Group] = {}
        for i, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
            address = (seed, step, example.id)
            draft = self.earlier.drafts(example.id, prompt, count, address=address)
            if draft is not None:
                drafts[i] = draft
        most = self.plan.max_completion_tokens
        for (i, draft), now in zip(drafts.items(), self._now([*drafts.values()]), strict=True):
            begun[i] = verify(draft, now, max_completion_tokens=most, seed=seed, step=step)
        return begun

    def _now(self, groups: Sequence[Group]) -> list[list[np.ndarray]]:
        """Return log-probabilities of earlier groups under the current policy."""
        self.rescored_tokens += sum(len(node.token_ids) for g in groups for node in g.nodes)
        return self.rescore(groups, self.plan) if groups else []

    def learn(self, scored: Sequence[ScoredGroup]) -> None:
        """Learn from a step's groups."""
        groups = [group.group for group in scored]
        if self.rule:
            self.rule.learn(groups)
        if self.config.rollout.reuse:
            self.earlier.add(groups)

    def encode(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """Return the token ids of the examples' prompts; none if agents make them.

        Raises: DataError for a prompt longer than rollout.max_prompt_tokens.
        """
        tokenizer, most = self.decoder.policy.tokenizer, self.config.rollout.max_prompt_tokens
        if isinstance(self.environments, Agents):
            return [()] * len(examples)
        if self.environments is not None:
            prompts = self.environments.prompts(examples)
        else:
            prompts = tokenizer.encode_prompts(examples)
        for example, prompt in zip(examples, prompts, strict=True):
            check_prompt(example, len(prompt), most)
        return prompts
