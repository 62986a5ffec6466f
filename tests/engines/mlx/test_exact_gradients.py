"""The update's gradient, and logits after forks, beside mlx-lm's own code, one row at a time.

The reference is the model as mlx-lm loads it: none of our networks, chunks, packings or caches,
full logits, and autodiff through them. Only the adapters' layer is ours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
from forests import flat_group, forest, scored
from mlx_lm.utils import load

from localrl.backend import mx, nn, tree_flatten
from localrl.config import LearningConfig
from localrl.engines.choose import choose_engine
from localrl.engines.open import make_policy
from localrl.learning.credit import assign_credit
from localrl.learning.objective import sampler_correction
from localrl.learning.objectives import make_objective
from localrl.learning.selection import select
from localrl.learning.update import Updater
from localrl.policy.lora import attach
from localrl.policy.model import load_model
from localrl.records import MemoryPlan

FAMILIES = ("qwen3", "llama", "lfm2", "qwen3_5", "qwen3_5_moe", "gemma4_text", "granitemoehybrid")
BOUNDS = {None: 1e-5, 4: 1e-4}
"""Largest relative error of the gradient, by bits."""
SHARP = 2e-5
"""The same in float32 for Gemma 4, whose attention does not scale its scores: rounding of rotary
positions is 1.5e-5 of the gradient in forests (2e-6 in rows)."""
LOGITS = 1e-4
"""Largest error of a logit, relative to their spread."""
TEMPERATURE = 0.8
LEARNING = LearningConfig(clip_low=1.0, clip_high=100.0)
LORA = {"rank": 4, "scale": 2.0, "seed": 0}
LONG = tuple(range(4, 44))
"""A prompt that is longer than a chunk of a recurrent layer."""


@pytest.fixture(scope="module", params=BOUNDS, ids=lambda bits: f"{bits or 32}-bit")
def bits(request):
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, bits, tmp_path_factory):
    """A policy, and the same model and adapters as mlx-lm computes them."""
    folder = tmp_path_factory.mktemp("models") / "model"
    tiny.make_folder(folder, bits=bits, **tiny.FAMILIES[request.param])
    policy = make_policy(load_model(folder), **LORA, for_cpu=True, dense=False)
    tiny.stir(policy.model, 0)
    policy = choose_engine(policy, "mlx")
    reference = load(str(folder))[0]
    attach(reference, **LORA)
    reference.update(policy.model.trainable_parameters())
    mx.eval(reference.parameters())
    return policy, reference


def batch():
    """A tree whose paths fork, and completions of a longer prompt, each long enough for chunks."""
    tree = scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2, tokens=18), [0, 1, 0])
    flat = scored(replace(flat_group(3, [True] * 36), prompt_ids=LONG), [1, 0, 0])
    groups = [tree, flat]
    return select(groups, [assign_credit(g) for g in groups], 40.0, make_objective(LEARNING)).batch


def path(nodes, index):
    """Tokens from the root down to this node."""
    node = nodes[index]
    return [*(path(nodes, node.parent) if node.parent >= 0 else []), *node.token_ids.tolist()]


def plain_loss(model, whole):
    """The objective's first update, node by node: each from a full forward pass of its path."""
    loss = mx.array(0.0)
    for index, node in enumerate(whole.nodes):
        tokens = mx.array([[*whole.prompts[node.prompt], *path(whole.nodes, index)]])
        logits = model(tokens)[0].astype(mx.float32) / TEMPERATURE
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        count = len(node.token_ids)
        ids = mx.array(node.token_ids)[:, None]
        own = mx.take_along_axis(logprobs[-count - 1 : -1], ids, axis=1)[:, 0]
        weights = sampler_correction(mx.stop_gradient(own), mx.array(node.anchor_logprobs))
        loss = loss - (weights * mx.array(node.coefficients) * own).sum()
    return loss / whole.z


@pytest.fixture(scope="module")
def expected(pair):
    """The gradient by autodiff of mlx-lm's forward pass."""
    _, reference = pair
    grad = nn.value_and_grad(reference, partial(plain_loss, reference))(batch())[1]
    return {name: np.array(array) for name, array in tree_flatten(grad)}


@pytest.mark.parametrize(
    ("shared", "recompute"), [(False, False), (True, False), (True, True)],
    ids=["rows", "forests", "forests recomputed"],
)  # fmt: skip
def test_the_gradient_is_that_of_full_logits(pair, expected, bits, shared, recompute):
    policy, _ = pair
    updater = Updater(policy, LEARNING, TEMPERATURE)
    updater.shared = shared
    plan = MemoryPlan(4, 4, 4, 4, 16, 64, 40, recompute, True, None, None, None, "")
    gradient, _ = updater.gradient(batch(), plan)
    found = {name: np.array(array) for name, array in tree_flatten(gradient)}
    assert found.keys() == expected.keys()
    size = np.sqrt(sum(np.square(array).sum() for array in expected.values()))
    error = np.sqrt(sum(np.square(found[name] - expected[name]).sum() for name in expected))
    assert size > 0
    sharp = type(policy.model).__module__.endswith("gemma4_text")
    assert error / size < max(BOUNDS[bits], SHARP * sharp)


def test_logits_after_forks_are_those_of_a_full_pass(pair):
    """Padded prompts, forked when decoding begins and twice more while it goes on."""
    policy, reference = pair
    prompts = [LONG, (1, 5, 9, 30, 2)]
    tokens = np.array([[*p, *[0] * (len(LONG) - len(p))] for p in prompts], np.int32)
    rows = np.array([0, 1, 1])
    state = policy.engine.prefill(tokens, [len(p) for p in prompts]).fork(rows, [0, 1])
    texts = [list(prompts[row]) for row in rows]
    draws = np.random.default_rng(0)
    for step in range(40):
        if step in (5, 37):
            chosen = np.array([2, 0, 2, 1]) if step == 5 else np.array([1, 0, 0])
            state.select(chosen)
            texts = [list(texts[row]) for row in chosen]
        drawn = draws.integers(4, 60, len(texts))
        state.step(drawn)
        for text, token in zip(texts, drawn, strict=True):
            text.append(int(token))
        if step not in (0, 6, 38, 39):
            continue
        found = state.logits()
        for row, text in enumerate(texts):
            whole = np.array(reference(mx.array([text]))[0, -1].astype(mx.float32))
            assert np.abs(found[row] - whole).max() / whole.std() < LOGITS
