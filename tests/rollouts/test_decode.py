from __future__ import annotations

import numpy as np
import pytest
from arrays import array_policy
from exact import assert_exact

from localrl.backend import mx
from localrl.engines.mlx.decode import draw
from localrl.engines.mlx.engine import MLXEngine
from localrl.records import Example
from localrl.rollouts.batch import DecodeLog
from localrl.rollouts.decode import Decoder
from localrl.rollouts.groups import Shape, sample_groups
from localrl.utils.rng import keyed_uniforms

TEXTS = ("12", "sum 1 2 3", "a", "zebra 99", "sort cab")


@pytest.fixture(scope="module")
def examples():
    return [Example(id=text, messages=({"role": "user", "content": text},)) for text in TEXTS]


def sample(policy, examples, *, rows, temperature=1.0, step=1, group_size=6, prefill_rows=0):
    decoder = Decoder(policy, temperature, rows, prefill_rows=prefill_rows)
    prompts = [policy.tokenizer.encode(example.messages) for example in examples]
    groups = sample_groups(
        decoder,
        examples,
        prompts,
        Shape(group_size, group_size),
        rule=None,
        max_completion_tokens=30,
        seed=0,
        step=step,
        version=0,
    )
    return groups, decoder.counts


def completions(groups):
    return [completion for group in groups for completion in group.completions()]


def same(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a.token_ids, b.token_ids) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_and_entropies_equal_a_full_forward(policy, examples, temperature):
    groups, _ = sample(policy, examples, rows=30, temperature=temperature)
    assert_exact(policy, groups, temperature)


@pytest.fixture(scope="module", params=["mlx", "numpy"])
def either(request, policy, tmp_path_factory):
    """A policy of each engine."""
    if request.param == "mlx":
        return policy
    return array_policy(tmp_path_factory.mktemp("models") / "arrays", "llama")


def test_temperature_0_takes_the_likeliest_token_and_draws_nothing(either, examples, monkeypatch):
    def drawn(*_):
        raise AssertionError("a number was drawn")

    monkeypatch.setattr(DecodeLog, "uniforms", drawn)
    groups, _ = sample(either, examples, rows=4, temperature=0.0, group_size=1)
    assert_exact(either, groups)  # log-probabilities and entropies are those of temperature 1
    for group, completion in zip(groups, completions(groups), strict=True):
        tokens = np.concatenate([group.prompt_ids, completion.token_ids])
        logits = np.array(either.model(mx.array(tokens[None]))[0, len(group.prompt_ids) - 1 : -1])
        chosen = logits[np.arange(len(completion)), completion.token_ids]
        assert (chosen >= logits.max(axis=-1) - 1e-4).all()
    other, _ = sample(either, examples, rows=30, temperature=0.0, group_size=1, step=2)
    assert same(completions(groups), completions(other))


@pytest.mark.exact
@pytest.mark.parametrize("rows", [1, 4, 29])
def test_the_rows_decoded_at_once_change_nothing(policy, examples, rows):
    whole, _ = sample(policy, examples, rows=30)
    parts, counts = sample(policy, examples, rows=rows)
    assert same(completions(whole), completions(parts))
    for a, b in zip(completions(whole), completions(parts), strict=True):
        np.testing.assert_allclose(a.sampled_logprobs, b.sampled_logprobs, atol=1e-4)
    # Each prompt is prefilled once, however its completions are spread over time.
    assert counts.prefill_positions == sum(len(group.prompt_ids) for group in whole)


def test_forward_calls_are_as_few_as_can_be(policy, examples):
    groups, counts = sample(policy, examples, rows=30)
    longest = max(len(completion) for completion in completions(groups))
    # One prefill gives the first tokens; every further token of the longest one is one call.
    assert counts.forward_calls == 1 + longest - 1


@pytest.mark.exact
@pytest.mark.parametrize("prefill_rows", [1, 2, 3, 5, 6])
def test_the_prompts_prefilled_at_once_change_nothing(policy, examples, prefill_rows, monkeypatch):
    whole, once = sample(policy, examples, rows=30)
    sizes = []
    prefill = MLXEngine.prefill

    def counted(self, tokens, lengths):
        sizes.append(len(lengths))
        return prefill(self, tokens, lengths)

    monkeypatch.setattr(MLXEngine, "prefill", counted)
    parts, counts = sample(policy, examples, rows=30, prefill_rows=prefill_rows)
    assert same(completions(whole), completions(parts))
    for a, b in zip(completions(whole), completions(parts), strict=True):
        np.testing.assert_allclose(a.sampled_logprobs, b.sampled_logprobs, atol=1e-4)
    expected = {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2], 5: [5], 6: [5]}
    assert sizes == expected[prefill_rows]
    # All rows begin before the first of them goes on: only the prefills are more.
    assert counts.forward_calls == once.forward_calls + len(sizes) - 1
    assert counts.prefill_positions == once.prefill_positions


@pytest.mark.exact
def test_prompts_wait_for_a_prefill_of_few_and_for_room(policy, examples):
    whole, _ = sample(policy, examples, rows=30)
    parts, counts = sample(policy, examples, rows=7, prefill_rows=2)
    assert same(completions(whole), completions(parts))
    assert counts.prefill_positions == sum(len(group.prompt_ids) for group in whole)


def patient(policy, monkeypatch):
    """The policy, sampling each token before the next step is queued."""
    monkeypatch.setattr(MLXEngine, "looks_ahead", False)
    return policy


def test_finished_rows_make_room(policy, examples, monkeypatch):
    groups, counts = sample(patient(policy, monkeypatch), examples, rows=4)
    tokens = sum(len(completion) - 1 for completion in completions(groups))
    # With few rows they leave at once: no position is decoded for a finished completion.
    assert counts.decode_positions == tokens


@pytest.mark.exact
@pytest.mark.parametrize("rows", [4, 30])
def test_looking_ahead_costs_one_position_a_completion_and_changes_nothing(
    policy, examples, rows, monkeypatch
):
    ahead, counts = sample(policy, examples, rows=rows)
    waited, fewer = sample(patient(policy, monkeypatch), examples, rows=rows)
    assert same(completions(ahead), completions(waited))
    for a, b in zip(completions(ahead), completions(waited), strict=True):
        np.testing.assert_allclose(a.sampled_logprobs, b.sampled_logprobs, atol=1e-4)
    early = sum(leaf.finish_reason == "stop" for group in ahead for leaf in group.leaves)
    assert early > 0
    assert 0 < counts.decode_positions - fewer.decode_positions <= len(completions(ahead))


@pytest.mark.exact
def test_draws_depend_on_seed_step_example_and_place_alone(policy, examples):
    whole, _ = sample(policy, examples, rows=30)
    again, _ = sample(policy, examples, rows=30)
    assert same(completions(whole), completions(again))
    alone, _ = sample(policy, examples[2:3], rows=30)
    assert same(completions(alone), completions(whole[2:3]))
    fewer, _ = sample(policy, examples, rows=30, group_size=3)
    assert same(completions(fewer[:1]), completions(whole[:1])[:3])
    other, _ = sample(policy, examples, rows=30, step=2)
    assert not same(completions(whole), completions(other))


def test_the_end_token_is_part_of_a_stopped_completion(policy, examples):
    groups, _ = sample(policy, examples, rows=30)
    reasons = set()
    for group in groups:
        for leaf, completion in zip(group.leaves, group.completions(), strict=True):
            ended = int(completion.token_ids[-1]) in policy.tokenizer.end_ids
            assert leaf.finish_reason == ("stop" if ended else "length")
            assert ended or len(completion) == 30
            assert not np.isin(completion.token_ids[:-1], [*policy.tokenizer.end_ids]).any()
            assert "<end>" not in leaf.text
            reasons.add(leaf.finish_reason)
    assert reasons == {"stop", "length"}


def test_draw_follows_the_distribution():
    logits = mx.array(np.tile(np.log([0.5, 0.0001, 0.3, 0.1999]), (20_000, 1)))
    uniforms = keyed_uniforms(20_000, "test")
    tokens, logprobs, entropies = draw(logits, mx.array(uniforms), 1.0)
    shares = np.bincount(np.array(tokens), minlength=4) / 20_000
    np.testing.assert_allclose(shares, [0.5, 0.0001, 0.3, 0.1999], atol=0.015)
    expected = np.log(np.array([0.5, 0.0001, 0.3, 0.1999]))[np.array(tokens)]
    np.testing.assert_allclose(np.array(logprobs), expected, atol=1e-5)
    probabilities = np.array([0.5, 0.0001, 0.3, 0.1999])
    entropy = -(probabilities * np.log(probabilities)).sum()
    np.testing.assert_allclose(np.array(entropies), entropy, atol=1e-5)


@pytest.mark.parametrize("uniform", [2**-24, 0.5, 1 - 2**-24])
def test_an_impossible_token_is_never_drawn(uniform):
    logits = mx.array([[-np.inf, 0.0, -np.inf, 0.0, -np.inf]])
    tokens, logprobs, entropies = draw(logits, mx.array([uniform], dtype=mx.float32), 1.0)
    assert tokens.item() in (1, 3)
    assert logprobs.item() == pytest.approx(np.log(0.5))
    assert entropies.item() == pytest.approx(np.log(2))


def test_logits_that_are_not_finite_stop_the_run(tmp_path):
    import tiny

    from localrl.errors import LocalRLError

    policy = tiny.make_tiny_policy(tmp_path / "model")
    policy.model.model.norm.weight = policy.model.model.norm.weight * float("nan")
    with pytest.raises(LocalRLError, match="not finite"):
        sample(policy, [Example(id="x", messages=({"role": "user", "content": "1"},))], rows=4)
