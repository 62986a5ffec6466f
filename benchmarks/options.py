"""The exact expectation over a prompt's known answers, as stages that `with_options` hands to a
session.

Nothing is sampled. A prompt's options are texts in its column `options`, each followed by the
model's end token unless `rollout.stop_text` ends it. They are scored as continuations o of one
shared prompt, and their coefficients add up to an exact gradient, without variance:

| over | advantage times weight of an option | the gradient of |
|---|---|---|
| options | p(o) / m (r(o) - J / m) | J / m, the expected reward given that it is an option |
| text | p(o) r(o) | J = sum of p(o) r(o): anything else has reward 0 |
| log text | p(o) r(o) / J | log J |

p(o) is the policy's probability of the whole option, m the sum over all. "Text" is what samplers
estimate if nothing but an option is ever rewarded, and needs no option without a reward; but where
p is small it teaches little, as sampling would. "Options" teaches at once which one is right, and
never to name one: its coefficients add up to 0. "Log text" with one right option is supervised
learning of it, which MaxRL (Tajwar et al. 2026, 2602.02710) approaches with more samples.

Every token scored counts as a generated one: like those it is computed once before the update and
once in it. It is cheaper in seconds, as all tokens are computed at once. Wording that a reward
accepts but the options lack is left out, a bias against the expected reward of free text.

What was found: on `first letter`, "text" needs 0.18 (0.08 to 0.37) of the tokens of pairs, and "log
text" 0.19 (0.06 to 0.60), five seeds, each at its own rate. Where an answer can be written down,
supervised learning of it is the better tool, and `localrl sft` does that. "Options" never gets
there (0.54 to 0.68 after 8,000 tokens): half of what is to be learned is to name an option at all.
On SmolLM2-135M, which was to name the kind of a word (one seed), "text" came from 0.17 to 0.75 in 8
steps of 8 tokens, and pairs to 0.86 in 8 steps of 16, in as many seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from rivals import instead

from localrl.errors import DataError
from localrl.learning.credit import Credit
from localrl.records import Example, Group, Leaf, Node, ScoredGroup
from localrl.training.sampler import Sampler
from localrl.training.session import Session

Over = Literal["options", "text", "log text"]
OVER: dict[str, Over] = {
    "options": "options",
    "options in text": "text",
    "options in log text": "log text",
}


def with_options(session: Session, name: str) -> Session:
    """Return the session with the stages of this name."""
    over = OVER[name]
    session.sampler = replace(instead(Listing, session.sampler), over=over)
    return replace(instead(Exact, session), over=over)


@dataclass(eq=False)
class Exact(Session):
    """A session whose credit is the exact gradient over each group's options."""

    over: Over = "options"

    def credit(self, step: int, scored: ScoredGroup) -> Credit:
        """Return advantages and weights whose products are the options' coefficients."""
        return option_credit(scored, self.over)


def option_credit(scored: ScoredGroup, over: Over) -> Credit:
    """Return the credit of a group in which every node is an option; see the table above."""
    logprobs = np.array(
        [node.sampled_logprobs.sum(dtype=np.float64) for node in scored.group.nodes]
    )
    rewards = np.array(scored.rewards, np.float64)
    if over == "text":
        shares, base = np.exp(logprobs), 0.0
    elif over == "options":
        shares = _softmax(logprobs)
        base = float(shares @ rewards)
    else:  # p r / J, of rewards above 0
        shares, base = _softmax(logprobs + np.log(rewards)) / rewards, 0.0
    return Credit(tuple(map(float, rewards - base)), tuple(map(float, shares)))


def _softmax(values: np.ndarray) -> np.ndarray:
    found = np.exp(values - values.max())
    return found / found.sum()


@dataclass(eq=False)
class Listing(Sampler):
    """A sampler that lists the options of a prompt and scores them."""

    over: Over = "options"

    def collect(self, step: int, examples: Sequence[Example], version: int) -> list[ScoredGroup]:
        """Return a group per example: its options, with their log-probabilities.

        Raises: DataError if an example has no options, or none with a reward.
        """
        prompts = self.encode(examples)
        listed = [self._listed(e, p, version) for e, p in zip(examples, prompts, strict=True)]
        scored = [self._needed(each) for each in self.score(listed)]
        found = self.rescore([each.group for each in scored], self.plan)
        return [
            replace(each, group=_with_logprobs(each.group, logprobs))
            for each, logprobs in zip(scored, found, strict=True)
        ]

    def _listed(self, example: Example, prompt: tuple[int, ...], version: int) -> Group:
        texts = example.columns.get("options") or ()
        if len(texts) < 2:
            raise DataError(f"{example.place or example.id} has no `options`: at least two texts.")
        nodes = tuple(_node(self._ids(text), version) for text in texts)
        leaves = tuple(Leaf(n, "stop", text) for n, text in enumerate(texts))
        return Group(example, prompt, nodes, leaves, len(nodes))

    def _ids(self, text: str) -> tuple[int, ...]:
        """Return an option's tokens, with the one that ends it."""
        tokenizer = self.decoder.policy.tokenizer
        ids, end = tokenizer.encode_text(text), tokenizer.rendered_end
        if not text.endswith(tuple(self.config.rollout.stop_text)):
            ids = (*ids, min(tokenizer.end_ids) if end is None else end)
        return ids[: self.plan.max_completion_tokens]

    def _needed(self, scored: ScoredGroup) -> ScoredGroup:
        """Return the options to score: all, or, where others add nothing, those with a reward."""
        kept = [i for i, r in enumerate(scored.rewards) if r is not None]
        if self.over != "options":
            kept = [i for i in kept if scored.rewards[i]]
        if not kept:
            raise DataError(f"No option of {scored.group.example.id} has a reward.")
        group = scored.group
        nodes = tuple(group.nodes[i] for i in kept)
        leaves = tuple(replace(group.leaves[i], node=n) for n, i in enumerate(kept))
        parts = {name: tuple(part[i] for i in kept) for name, part in scored.parts.items()}
        rewards = tuple(scored.rewards[i] for i in kept)
        return ScoredGroup(replace(group, nodes=nodes, leaves=leaves), rewards, parts)


def _node(ids: Sequence[int], version: int) -> Node:
    zeros = np.zeros(len(ids), np.float32)
    return Node(-1, np.array(ids, np.int32), np.ones(len(ids), bool), zeros, zeros, version=version)


def _with_logprobs(group: Group, logprobs: Sequence[np.ndarray]) -> Group:
    pairs = zip(group.nodes, logprobs, strict=True)
    return replace(group, nodes=tuple(replace(n, sampled_logprobs=found) for n, found in pairs))
