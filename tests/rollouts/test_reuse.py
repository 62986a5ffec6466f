"""Earlier completions that begin new ones, on tiny real models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from exact import assert_exact
from forests import flat_group, forest

from localrl.learning.credit import with_expected_reward
from localrl.policy.scoring import group_logprobs
from localrl.records import Completion, Example, Group, Node
from localrl.rollouts.decode import Decoder
from localrl.rollouts.forking import PeriodicRule, Spacing, forks_per_path
from localrl.rollouts.groups import Shape, sample_groups
from localrl.rollouts.reuse import (
    CompletionCache,
    Prefix,
    accepted,
    verified_prefix,
    verify,
    with_reused,
)
from localrl.rollouts.stops import make_stops

TEXTS = ("12", "sum 1 2 3 and more of it", "a")
EXAMPLES = [Example(id=text, messages=({"role": "user", "content": text},)) for text in TEXTS]
COUNT = 4
LMAX = 24
FLAT = Shape(COUNT, COUNT)
NONE = np.zeros(0, np.float32)
EMPTY = Prefix(np.zeros(0, np.int32), NONE, NONE, 0, NONE, None)


# One that NumPy computes; windows; convolutions, whose state can't be cut.
@pytest.fixture(scope="module", params=["qwen3", "gemma3_text", "lfm2"])
def policies(request, tmp_path_factory):
    """A policy, and the same one some updates later."""
    found = []
    for size in (0.05, 0.08):
        folder = tmp_path_factory.mktemp("models") / request.param
        found.append(tiny.make_tiny_policy(folder, **tiny.FAMILIES[request.param]))
        tiny.stir(found[-1].model, 0, size)
    return found


def prompts(policy):
    return [policy.tokenizer.encode(example.messages) for example in EXAMPLES]


def complete(
    decoder, prefixes, *, step, shape=FLAT, lmax=LMAX, rule=None, which=slice(None)
) -> list[Group]:
    """Groups of these examples that begin with these prefixes."""
    return sample_groups(
        decoder,
        EXAMPLES[which],
        prompts(decoder.policy)[which],
        shape,
        rule=rule,
        max_completion_tokens=lmax,
        seed=0,
        step=step,
        version=step,
        begun=prefixes[which],
    )


def first_visit(policy, step=1) -> list[Group]:
    return complete(Decoder(policy, 1.0, 16), [[EMPTY] * COUNT] * len(EXAMPLES), step=step)


def second_visit(policy, groups, *, lmax=LMAX, step=2):
    """(prefixes, groups, counts) of the next step under this policy."""
    earlier = CompletionCache()
    earlier.add(groups)
    drafts = [
        earlier.drafts(example.id, prompt, COUNT, address=(0, step, example.id))
        for example, prompt in zip(EXAMPLES, prompts(policy), strict=True)
    ]
    settings = {"shared": False, "micro_rows": 4, "head_chunk": 16, "temperature": 1.0}
    now = group_logprobs(policy, drafts, **settings)
    prefixes = [
        verify(one, logprobs, max_completion_tokens=lmax, seed=0, step=step)
        for one, logprobs in zip(drafts, now, strict=True)
    ]
    decoder = Decoder(policy, 1.0, 16)
    return prefixes, complete(decoder, prefixes, step=step, lmax=lmax), decoder.counts


def full(policy, group: Group, completion: Completion) -> np.ndarray:
    one = replace(
        group,
        nodes=(Node(-1, *(getattr(completion, name) for name in FIELDS)),),
        leaves=(),
    )
    settings = {"shared": False, "micro_rows": 1, "head_chunk": 99, "temperature": 1.0}
    return group_logprobs(policy, [one], **settings)[0][0]


FIELDS = ("token_ids", "sampled", "sampled_logprobs", "entropies")


def test_an_unchanged_policy_accepts_everything_and_generates_nothing(policies):
    groups = first_visit(policies[0])
    assert_exact(policies[0], groups)
    prefixes, again, counts = second_visit(policies[0], groups)
    assert all(prefix.complete for family in prefixes for prefix in family)
    assert counts.forward_calls == counts.decode_positions == counts.prefill_positions == 0
    for one, other in zip(groups, again, strict=True):
        assert other.leaves == one.leaves
        assert other.planned_roots == len(other.nodes) == COUNT
        for a, b in zip(one.nodes, other.nodes, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            assert a.sampled_logprobs.tolist() == b.sampled_logprobs.tolist()
            assert (a.version, b.version) == (1, 1)
            assert a.old_logprobs is None
            np.testing.assert_allclose(b.old_logprobs, b.sampled_logprobs, atol=1e-4)


def test_a_changed_policy_keeps_prefixes_and_writes_the_rest(policies):
    old, new = policies
    before = first_visit(old)
    prefixes, after, counts = second_visit(new, before)
    lengths = [[len(prefix) for prefix in family] for family in prefixes]
    assert 0 < sum(map(sum, lengths)) < sum(len(n.token_ids) for g in before for n in g.nodes)
    fresh = 0
    for group, earlier, family in zip(after, before, prefixes, strict=True):
        assert group.planned_roots == sum(node.parent < 0 for node in group.nodes) == COUNT
        for i, (completion, prefix) in enumerate(zip(group.completions(), family, strict=True)):
            k = len(prefix)
            draft = earlier.completion(i)
            assert completion.token_ids[:k].tolist() == draft.token_ids[:k].tolist()
            assert completion.sampled_logprobs[:k].tolist() == draft.sampled_logprobs[:k].tolist()
            assert len(completion) <= LMAX
            assert completion.text == text_of(new, completion)
            now = full(new, group, completion)
            np.testing.assert_allclose(completion.sampled_logprobs[k:], now[k:], atol=1e-4)
            np.testing.assert_allclose(prefix.old_logprobs, now[:k], atol=1e-4)
            check_nodes(group, i, prefix)
            fresh += len(completion) - k
    # The first token of each tail comes from a prefill, which serves tails of one beginning.
    tails = sum(not prefix.complete for family in prefixes for prefix in family)
    assert counts.decode_positions >= fresh - tails > 0
    assert fresh == sum(
        len(n.token_ids) for group in after for n in group.nodes if n.old_logprobs is None
    )


def text_of(policy, completion: Completion) -> str:
    ids = completion.token_ids.tolist()
    return policy.tokenizer.decode(ids[:-1] if completion.finish_reason == "stop" else ids)


def check_nodes(group: Group, leaf: int, prefix: Prefix) -> None:
    path = [group.nodes[n] for n in group.path(group.leaves[leaf].node)]
    stale = [node for node in path if node.old_logprobs is not None]
    fresh = [node for node in path if node.old_logprobs is None]
    assert len(stale) == bool(len(prefix))
    assert len(fresh) == (not prefix.complete)
    assert path == [*stale, *fresh]
    assert [node.version for node in path] == [1] * len(stale) + [2] * len(fresh)
    assert all(node.cond_weight == 1 and len(node.token_ids) for node in path)


def test_draws_depend_on_the_place_alone(policies):
    old, new = policies
    before = first_visit(old)
    prefixes, after, _ = second_visit(new, before)
    _, again, _ = second_visit(new, before)
    assert tokens(again) == tokens(after)
    # Fewer rows, and one example alone, give the same tails.
    assert tokens(complete(Decoder(new, 1.0, 2), prefixes, step=2)) == tokens(after)
    alone = complete(Decoder(new, 1.0, 3), prefixes, step=2, which=slice(1, 2))
    assert tokens(alone) == tokens(after[1:2])
    _, other, _ = second_visit(new, before, step=3)
    assert tokens(other) != tokens(after)


def tokens(groups: list[Group]) -> list[list[int]]:
    return [c.token_ids.tolist() for group in groups for c in group.completions()]


def test_a_shorter_limit_cuts(policies):
    old, new = policies
    before = first_visit(old)
    for policy in (old, new):
        prefixes, after, _ = second_visit(policy, before, lmax=6)
        for family, group, earlier in zip(prefixes, after, before, strict=True):
            for i, prefix in enumerate(family):
                if len(earlier.completion(i)) > 6:
                    assert not prefix.complete
                    assert len(prefix) <= 5
                assert len(prefix) < len(group.completion(i)) <= 6 or prefix.complete


def test_a_third_visit_reuses_what_was_reused(policies):
    old, new = policies
    _, after, _ = second_visit(new, first_visit(old))
    prefixes, last, counts = second_visit(new, after, step=3)
    # Accepted tokens were sampled by another policy, so some are refused again; the tails are not.
    assert tokens(last)
    assert {prefix.version for family in prefixes for prefix in family} <= {1, 2}
    assert counts.decode_positions <= sum(map(len, tokens(last)))
    for group in last:
        for completion in group.completions():
            assert completion.text == text_of(new, completion)


def test_acceptance_by_hand():
    log = np.log
    now = log([0.5, 0.2, 0.3])
    sampled = log([0.4, 0.4, 0.3])  # ratios 1.25, 0.5, 1
    assert accepted(now, sampled, np.array([0.99, 0.49, 0.99])) == 3
    assert accepted(now, sampled, np.array([0.99, 0.51, 0.01])) == 1
    assert accepted(now, log([0.6, 0.4, 0.3]), np.array([0.9, 0.1, 0.1])) == 0
    assert accepted(np.array([0.0, np.nan]), np.zeros(2), np.zeros(2)) == 1
    assert accepted(np.array([-1e6, 0.0]), np.zeros(2), np.full(2, 2**-24)) == 0
    assert accepted(np.array([1e6, 0.0]), np.zeros(2), np.full(2, 0.99)) == 2
    assert accepted(NONE, NONE, NONE) == 0
    # Two thirds of the squares are rounding: ratio 0.5 ** (1 / 3) = 0.79, not 0.5.
    rounding = np.sqrt(2 / 3) * log([0.5, 1.0, 1.0])
    halved = log([0.5, 1.0, 1.0])
    assert accepted(halved, np.zeros(3), np.full(3, 0.78), rounding) == 3
    assert accepted(halved, np.zeros(3), np.full(3, 0.81), rounding) == 0
    assert accepted(halved, np.zeros(3), np.full(3, 0.78)) == 0


@pytest.mark.parametrize(
    ("reason", "refused_at", "limit", "length", "finish"),
    [
        ("stop", None, 5, 4, "stop"),
        ("stop", None, 4, 4, "stop"),
        ("closed", None, 5, 4, "closed"),
        ("loop", None, 5, 4, "loop"),
        ("length", None, 4, 4, "length"),
        ("length", None, 5, 4, None),  # cut at a shorter limit than today's: goes on
        ("stop", None, 3, 2, None),  # longer than today's limit
        ("stop", 2, 5, 2, None),
        ("stop", 0, 5, 0, None),
        ("length", 3, 4, 3, None),
        ("stop", None, 1, 0, None),
        ("stop", 3, 2, 1, None),
    ],
)
def test_verified_prefixes(reason, refused_at, limit, length, finish):
    draft = replace(forest([-1], [0], 1, tokens=4).nodes[0], version=7)
    now = draft.sampled_logprobs.copy()
    if refused_at is not None:
        now[refused_at] = -99.0
    prefix = verified_prefix(draft, reason, now, np.full(4, 0.5), limit)
    assert len(prefix) == length
    assert prefix.finish_reason == finish
    assert prefix.complete == (finish is not None)
    assert prefix.version == 7
    assert prefix.token_ids.tolist() == draft.token_ids[:length].tolist()
    assert prefix.old_logprobs.dtype == np.float32
    assert prefix.old_logprobs.tolist() == now[:length].tolist()
    assert len(prefix.sampled_logprobs) == len(prefix.entropies) == length


def test_tokens_are_compared_with_a_pass_like_that_of_now():
    """A reused prefix that was scored, and a tail that was not, as of an older checkpoint."""
    chain = forest([-1, 0], [1], 1)
    scored = np.array([-1.5, -1.25, -1.0], np.float32)
    chain = replace(chain, nodes=(replace(chain.nodes[0], scored_logprobs=scored), chain.nodes[1]))
    earlier = CompletionCache()
    earlier.add([chain])
    drafts = earlier.drafts(chain.example.id, chain.prompt_ids, 1, address=())
    assert drafts is not None
    draft = drafts.nodes[0]
    assert draft.scored_logprobs is not None
    assert draft.scored_logprobs.tolist() == [*scored, -1, -1, -1]
    # The sampler's record, -1, would reject the first token.
    prefix = verified_prefix(draft, "stop", draft.scored_logprobs, np.full(6, 0.9), 8)
    assert prefix.complete
    cut = verified_prefix(draft, "stop", draft.scored_logprobs, np.full(6, 0.9), 3)
    assert cut.scored_logprobs is not None
    assert cut.scored_logprobs.tolist() == [-1.5, -1.25]
    plain = verified_prefix(chain.nodes[1], "stop", scored, np.full(3, 0.9), 8)
    assert plain.scored_logprobs is None
    assert len(plain) == 0


def test_what_was_expected_of_a_completion_stays_with_its_prefix(policy):
    """From before its oldest tokens were drawn, however often it comes back."""
    chain = with_expected_reward(forest([-1, 0], [1], 1), 0.25)
    for later in (0.5, 0.75):
        earlier = CompletionCache()
        earlier.add([chain])
        drafts = earlier.drafts(chain.example.id, chain.prompt_ids, 1, address=())
        assert drafts is not None
        draft = drafts.nodes[0]
        prefix = verified_prefix(draft, "stop", draft.sampled_logprobs, np.full(6, 0.5), 6)
        empty = replace(chain, nodes=(), leaves=())
        again = with_reused(empty, [prefix], [None], tokenizer=policy.tokenizer, version=1)
        chain = with_expected_reward(again, later)
        assert [node.expected_reward for node in chain.nodes] == [0.25]
    # A tail of which nothing was accepted is new.
    fresh = replace(chain.nodes[0], old_logprobs=None)
    (new,) = with_expected_reward(replace(chain, nodes=(fresh,)), 0.75).nodes
    assert new.expected_reward == 0.75


def test_reused_completions_take_the_places_of_the_last_roots(policies):
    old, new = policies
    prefixes, _, _ = second_visit(new, first_visit(old))
    begun = [prefixes[0][:2], (), prefixes[2]]  # some, none, and all that there are
    groups = complete(Decoder(new, 1.0, 16), begun, step=2)
    flat = complete(Decoder(new, 1.0, 16), [()] * 3, step=2)
    for group, plain, family in zip(groups, flat, begun, strict=True):
        fresh = COUNT - len(family)
        assert group.planned_roots == plain.planned_roots == COUNT
        assert sum(node.parent < 0 for node in group.nodes) == len(group.leaves) == COUNT
        assert tokens([group])[:fresh] == tokens([plain])[:fresh]
        assert all(node.version == 2 for node in group.nodes[:fresh])
        assert all(node.parent < n for n, node in enumerate(group.nodes))
        for i, prefix in enumerate(family):
            whole = group.completion(fresh + i)
            assert whole.token_ids[: len(prefix)].tolist() == prefix.token_ids.tolist()
            check_nodes(group, fresh + i, prefix)
    # A tail is the same whatever stands before it in the group.
    every = complete(Decoder(new, 1.0, 16), prefixes, step=2)
    assert tokens(groups[2:]) == tokens(every[2:])
    assert tokens(groups[:1])[2:] == tokens(every[:1])[:2]


def test_what_is_complete_is_not_decoded(policies):
    old = policies[0]
    prefixes, _, _ = second_visit(old, first_visit(old))
    decoder = Decoder(old, 1.0, 16)
    groups = complete(decoder, [prefixes[0], (), prefixes[2][:3]], step=2)
    assert [group.planned_roots for group in groups] == [COUNT] * 3
    assert [len(group.leaves) for group in groups] == [COUNT] * 3
    assert decoder.counts.prefill_positions == sum(len(g.prompt_ids) for g in groups[1:])
    assert {node.old_logprobs is None for node in groups[0].nodes} == {False}
    assert all(node.old_logprobs is None for node in groups[1].nodes)


def test_trees_begin_with_prefixes_too(policies):
    old, new = policies
    prefixes, _, _ = second_visit(new, first_visit(old))
    begun = [prefixes[0][:1], (), prefixes[2][:2]]
    shape, rule = Shape(2, 6), PeriodicRule(Spacing(2, 6, 12.0))
    groups = complete(Decoder(new, 1.0, 16), begun, step=2, shape=shape, rule=rule)
    assert any(len(group.leaves) > 2 for group in groups[:2])
    assert len(groups[2].leaves) == 2  # all of its roots were there: nothing forks
    for group, family in zip(groups, begun, strict=True):
        assert group.planned_roots == sum(node.parent < 0 for node in group.nodes) == 2
        assert len(group.leaves) <= 6
        for i, prefix in enumerate(family):
            check_nodes(group, len(group.leaves) - len(family) + i, prefix)
    # The end of a prefix is no fork.
    assert forks_per_path(groups[2:]) == 0


@pytest.mark.parametrize("kept", [10, 40])
def test_a_loop_begun_in_the_prefix_ends_the_completion(policy, kept):
    stops = make_stops(policy.tokenizer, loops=True, texts=())
    assert stops is not None
    decoder = Decoder(policy, 0.001, 16, stops=stops)
    before = complete(decoder, [()] * 3, step=1, shape=Shape(1, 1), lmax=100)
    assert {leaf.finish_reason for group in before for leaf in group.leaves} == {"loop"}
    prefixes = []
    for group in before:
        (draft,), (leaf,) = group.nodes, group.leaves
        now = draft.sampled_logprobs.copy()
        now[kept] = -np.inf
        uniforms = np.full(len(now), 0.5)
        prefixes.append([verified_prefix(draft, leaf.finish_reason, now, uniforms, 100)])
        assert len(prefixes[-1][0]) == kept
    after = complete(decoder, prefixes, step=2, shape=Shape(1, 1), lmax=100)
    # So cold, the tails are what they were, and end where they did.
    assert tokens(after) == tokens(before)
    assert [group.leaves[0].finish_reason for group in after] == ["loop"] * 3


def test_tails_of_one_beginning_share_a_prefill(policy):
    decoder = Decoder(policy, 1.0, 16)
    groups = complete(decoder, [[EMPTY] * COUNT] * len(EXAMPLES), step=1)
    assert decoder.counts.prefill_positions == sum(len(group.prompt_ids) for group in groups)
    assert all(node.parent < 0 for group in groups for node in group.nodes)
    assert len({tuple(c.token_ids) for c in groups[0].completions()}) > 1


def drafts(group: Group, count=9, key=0, prompt=None) -> Group | None:
    earlier = CompletionCache()
    earlier.add([group])
    prompt = group.prompt_ids if prompt is None else prompt
    return earlier.drafts(group.example.id, prompt, count, address=(0, key))


def test_drafts_are_whole_paths_with_the_oldest_version():
    group = forest([-1, 0, -1], [1, 2], planned_roots=2)
    nodes = [replace(node, version=n + 3) for n, node in enumerate(group.nodes)]
    nodes[0] = replace(nodes[0], old_logprobs=nodes[0].sampled_logprobs)
    found = drafts(replace(group, nodes=tuple(nodes)))
    assert found is not None
    assert [node.token_ids.tolist() for node in found.nodes] == [[4, 5, 6, 5, 6, 7], [6, 7, 8]]
    assert [(n.version, n.parent, n.old_logprobs) for n in found.nodes] == [
        (3, -1, None),
        (5, -1, None),
    ]
    assert found.planned_roots == 2


def test_a_tree_gives_a_leaf_for_each_root_as_its_forks_would():
    # Root 0 ends in node 1 (1/2) or, through node 2, in 3 or 4 (1/4 each); root 5 has no forks.
    tree = forest([-1, 0, 0, 2, 2, -1], [1, 3, 4, 5], planned_roots=2)
    ends = []
    for key in range(400):
        found = drafts(tree, key=key)
        assert found is not None
        assert [len(node.token_ids) for node in found.nodes][1:] == [3]
        ends.append(int(found.nodes[0].token_ids[-1]))
    shares = [ends.count(n + 4 + 2) / 400 for n in (1, 3, 4)]
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=0.1)


def test_what_cannot_be_reused():
    group = flat_group(3)
    assert drafts(group, prompt=(*group.prompt_ids, 9)) is None
    assert drafts(group, count=0) is None
    few = drafts(group, count=2)
    assert few is not None
    assert [node.token_ids[0] for node in few.nodes] == [n.token_ids[0] for n in group.nodes[:2]]
    assert drafts(flat_group(2, (True, False, True))) is None  # a tool wrote a part of it
    failed = tuple(replace(leaf, finish_reason="error") for leaf in group.leaves)
    assert drafts(replace(group, leaves=failed)) is None
    assert drafts(replace(group, leaves=())) is None
    assert CompletionCache().drafts("nothing", (1,), 3, address=(0,)) is None


def named(name: str, size: int) -> Group:
    return replace(flat_group(size), example=Example(id=name, messages=()))


def test_the_newest_groups_are_kept_as_far_as_there_is_room():
    earlier = CompletionCache(most_tokens=18)  # groups of 3 tokens for each completion
    earlier.add([named("a", 2), named("b", 2), named("c", 2)])
    assert len(earlier) == 3
    earlier.add([named("a", 1)])  # seen again: now b is the one longest unseen
    earlier.add([named("d", 2)])
    assert len(earlier) == 3
    ids = {name for name in "abcd" if earlier.drafts(name, (1, 5, 6, 2), 9, address=(0,))}
    assert ids == {"a", "c", "d"}
    earlier.add([named("huge", 50)])
    assert len(earlier) == 0
