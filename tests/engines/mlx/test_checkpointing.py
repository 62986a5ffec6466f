"""Recomputed blocks: the plain gradient from less memory, and a model that stays what it was."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import tiny
from forests import flat_group, forest, scored
from steps import plan, relative_difference, selection

from localrl.backend import mx, tree_flatten
from localrl.engines.mlx.checkpointing import PROBED, checkpointed
from localrl.engines.mlx.engine import MLXEngine
from localrl.engines.mlx.network import Network
from localrl.learning.objectives import OBJECTIVES
from localrl.learning.update import Updater
from localrl.policy.model import Policy
from localrl.records import Batch, Group
from localrl.settings import LearningConfig

WITH_KL = LearningConfig(clip_low=1.0, clip_high=100.0, kl_coef=0.1)
DEEP = {"intermediate_size": 256, "num_hidden_layers": 8, "vocab_size": 128, "bits": None}


def with_prompt(group: Group, prompt: tuple[int, ...]) -> Group:
    return replace(group, prompt_ids=prompt)


def batch(kl: bool = True) -> Batch:
    """A tree of three levels, shallower ones and a flat group, behind prompts of many lengths."""
    deep = forest([-1, -1, 0, 0, 3, 3, 1, 1], leaves=[2, 4, 5, 6, 7], planned_roots=2, tokens=9)
    groups = [
        scored(with_prompt(deep, (1, *range(5, 25), 2)), [1, 0, 1, 0, 0]),
        scored(with_prompt(forest([-1, -1, 0, 0], [1, 2, 3], 2, 6), (2,)), [0, 0, 1]),
        scored(flat_group(4), [1, 0, 0, 1]),
    ]
    made = selection(OBJECTIVES["clipped"], groups).batch
    if not kl:
        return made
    nodes = [replace(n, kl_weights=np.full(len(n.token_ids), 0.1, np.float32)) for n in made.nodes]
    return replace(made, nodes=tuple(nodes))


def gradient(policy: Policy, shared: bool, recomputed: bool, batch: Batch):
    updater = Updater(policy, WITH_KL, 0.8)
    updater.gradient.shared = shared
    return updater.gradient(batch, replace(plan(8), grad_checkpoint=recomputed))


@pytest.mark.parametrize(
    ("family", "shared"),
    [
        (name, True)
        for name in ("qwen3", "llama", "gemma3_text", "qwen3_moe", "gemma4_text", "lfm2", "qwen3_5")
    ]
    + [(name, False) for name in ("qwen3", "gemma3_text", "qwen3_moe", "lfm2", "qwen3_5")],
)
def test_loss_and_gradient_are_the_plain_ones(tmp_path, family, shared):
    policy = tiny.make_tiny_policy(tmp_path / "model", **tiny.FAMILIES[family])
    assert policy.engine.check_recompute().accepted
    plain, one = gradient(policy, shared, False, batch())
    again, other = gradient(policy, shared, True, batch())
    assert relative_difference(again, plain) < 1e-6
    assert one.sums() == other.sums()
    assert one.kl > 0


def test_adapters_on_a_few_blocks_and_a_quantised_base(tmp_path):
    from localrl.engines.open import make_policy
    from localrl.policy.model import load_model

    loaded = load_model(tiny.make_folder(tmp_path / "model", num_hidden_layers=3))
    wish = {"rank": 4, "scale": 2.0, "seed": 0, "for_cpu": True, "dense": False, "layers": 1}
    policy = make_policy(loaded, **wish)
    tiny.stir(policy.model, 0)
    for shared in (True, False):
        plain, _ = gradient(policy, shared, False, batch())
        again, _ = gradient(policy, shared, True, batch())
        assert relative_difference(again, plain) < 1e-6


def test_a_policy_whose_head_is_not_split(policy):
    whole = replace(policy, engine=MLXEngine(Network(policy.model)))
    assert whole.engine.check_recompute().accepted
    plain, _ = gradient(whole, False, False, batch())
    again, _ = gradient(whole, False, True, batch())
    assert relative_difference(again, plain) < 1e-6


def test_the_model_is_what_it_was(policy):
    tokens = mx.array([[1, 5, 9, 2]])
    blocks, inside = policy.model.model.layers, list(policy.model.layers)
    before, logits = dict(tree_flatten(policy.model.parameters())), policy.model(tokens)
    gradient(policy, True, True, batch())
    with checkpointed(policy.engine.network):
        assert policy.model.layers[0] is not inside[0]
        assert policy.model.layers[0].self_attn is inside[0].self_attn
        policy.engine.network.hidden(tokens)
    assert policy.model.model.layers is blocks
    assert all(now is then for now, then in zip(blocks, inside, strict=True))
    after = dict(tree_flatten(policy.model.parameters()))
    assert after.keys() == before.keys()
    assert mx.array_equal(policy.model(tokens), logits).item()


def test_the_probe_is_longer_than_metals_vector_kernels_take():
    """They raise an error in a gradient, with mlx 0.32.4."""
    assert PROBED > 8


def test_an_error_in_a_block_leaves_its_parameters(policy, monkeypatch):
    block = policy.model.layers[1]
    before = dict(tree_flatten(block.trainable_parameters()))

    def broken(self, *args):
        raise ZeroDivisionError

    monkeypatch.setattr(type(block.mlp), "__call__", broken)
    with pytest.raises(ZeroDivisionError):
        gradient(policy, True, True, batch(kl=False))
    assert policy.model.layers[1] is block
    # The arrays of the trace that broke off hold the same numbers.
    after = dict(tree_flatten(block.trainable_parameters()))
    assert all(mx.array_equal(after[name], before[name]).item() for name in before)


def test_families_that_go_past_their_blocks_are_found(policy, monkeypatch):
    body = type(policy.model.model)
    usual = body.__call__
    hidden_blocks = policy.model.model.layers

    def elsewhere(self, *args, **kwargs):
        shown, self.layers = self.layers, hidden_blocks
        try:
            return usual(self, *args, **kwargs)
        finally:
            self.layers = shown

    monkeypatch.setattr(body, "__call__", elsewhere)
    assert not policy.engine.check_recompute().accepted
    assert policy.model.model.layers is hidden_blocks


def test_blocks_that_take_values_beside_their_inputs_are_found(policy, monkeypatch):
    block = type(policy.model.layers[0])
    usual = block.__call__
    noted = []

    def chatty(self, x, mask=None, cache=None):
        y = usual(self, x, mask, cache)
        noted.append(y)
        return y + 0.5 * noted[-2] if len(noted) > 1 else y

    monkeypatch.setattr(block, "__call__", chatty)
    assert not policy.engine.check_recompute().accepted


def peak(policy: Policy, shared: bool, recomputed: bool, wish: Batch) -> int:
    """Bytes above what is there before."""
    gc.collect()  # models of other tests
    mx.clear_cache()  # a buffer that is used again may be larger than what is in it
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    gradient(policy, shared, recomputed, wish)
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("shared", [True, False])
def test_it_takes_less_than_half_the_memory(tmp_path, shared):
    policy = tiny.make_tiny_policy(tmp_path / "model", **DEEP)
    group = with_prompt(flat_group(4, sampled=[True] * 96), tuple(range(4, 36)))
    wish = selection(OBJECTIVES["clipped"], [scored(group, [1, 0, 0, 1])]).batch
    plain = peak(policy, shared, False, wish)
    assert peak(policy, shared, True, wish) < plain / 2


@pytest.mark.parametrize(("prompt", "tokens"), [(129, 5), (9, 33)])
def test_what_is_kept_is_each_blocks_input_and_the_prompt_once(tmp_path, prompt, tokens):
    # Of every block the states of 64 numbers are kept, and of the prompt alone, whose last token
    # belongs to the completions, keys and values of 32 each: once, though 8 completions read them.
    kept = 4 * ((prompt - 1 + 8 * tokens) * 64 + (prompt - 1) * 2 * 32)
    flat = flat_group(8, sampled=[True] * tokens)
    group = with_prompt(flat, tuple(n % 60 + 4 for n in range(prompt)))
    wish = selection(OBJECTIVES["clipped"], [scored(group, [1, 0, 0, 1] * 2)]).batch
    peaks = []
    for layers in (8, 24):
        folder, sizes = tmp_path / f"{layers}", {**DEEP, "num_hidden_layers": layers}
        policy = tiny.make_tiny_policy(folder, **sizes)
        adapters = sum(a.nbytes for _, a in tree_flatten(policy.model.trainable_parameters()))
        peaks.append(peak(policy, True, True, wish) - adapters)
    assert (peaks[1] - peaks[0]) / 16 < 1.25 * kept
