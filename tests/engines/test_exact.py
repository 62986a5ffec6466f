"""Update and decoding beside mlx-lm's own forward pass, of which nothing is replaced.

The other side loads the same files with mlx-lm, adds mlx-lm's LoRA layers, computes each path alone
with whole logits and without a cache, and has the loss written out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tiny
from forests import flat_group, forest, scored
from steps import TEMPERATURE, plan, relative_difference, selection

from localrl.backend import mx, nn, tree_unflatten
from localrl.engines.choose import choose_engine
from localrl.engines.mlx import gated_delta, mamba
from localrl.engines.open import make_policy
from localrl.learning.objectives import make_objective
from localrl.learning.update import Updater
from localrl.policy.lora import adapted_layers
from localrl.policy.model import Policy, load_model
from localrl.records import Batch, Group
from localrl.settings import LearningConfig

SHAPES = {**tiny.FAMILIES, **tiny.UNPLANNED}
for name in ("qwen3_5", "qwen3_5_moe"):  # three layers instead of four: mlx-lm's loop is slow
    text = SHAPES[name]["text_config"] | {"num_hidden_layers": 3, "full_attention_interval": 2}
    SHAPES[name] = SHAPES[name] | {"text_config": text}
HYBRIDS = ("qwen3_5", "qwen3_5_moe", "gemma4_text", "lfm2", "granitemoehybrid", "nemotron_h")
CASES = [
    *(("mlx", name, bits) for name in ("qwen3", "llama", *HYBRIDS) for bits in (None, 4)),
    *(("cpu", name, bits) for name in ("qwen3", "llama") for bits in (None, 4)),
]
LIMITS = {None: 1e-5, 4: 1e-4}
"""Of the norm of the gradient's error, relative to its norm."""
LOGITS = 1e-4
"""Of the largest error of a logit, relative to the spread of the logits."""
LEARNING = LearningConfig(lr=0.0, kl_coef=0.1, kl_estimator="k2")
LONG = tuple(int(n) for n in np.random.default_rng(0).integers(4, 60, mamba.CHUNK + 7))
"""A prompt of several chunks of a recurrence, and of many windows."""
PROMPTS = (1, 30, 31, 2), LONG, (1, 5, 6, 7, 8, 9, 10, 11, 12, 2)
assert len(LONG) > 2 * gated_delta.CHUNK


@dataclass(frozen=True)
class Pair:
    policy: Policy
    stock: Any
    """mlx-lm's model of the same weights and adapters."""
    limit: float


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def pair(request, tmp_path_factory) -> Pair:
    from mlx_lm.utils import load_model as load_stock

    engine, family, bits = request.param
    folder = tmp_path_factory.mktemp("models") / family
    loaded = load_model(tiny.make_folder(folder, bits=bits, **SHAPES[family]))
    options = {"rank": 4, "scale": 2.0, "seed": 0, "for_cpu": True, "dense": engine == "cpu"}
    policy = make_policy(loaded, **options)
    tiny.stir(policy.model, 0)
    stock = load_stock(folder)[0]
    adapt(stock, policy)
    return Pair(choose_engine(policy, engine), stock, LIMITS[bits])


def adapt(stock, policy):
    """Give mlx-lm's model its own kind of adapters, with the policy's weights."""
    from mlx_lm.tuner.lora import LoRALinear

    stock.freeze()
    modules = dict(stock.named_modules())
    for path, layer in adapted_layers(policy.model):
        rank = layer.lora_a.shape[1]
        adapter = LoRALinear.from_base(modules[path], r=rank, scale=layer.scale)
        adapter.lora_a, adapter.lora_b = layer.lora_a, layer.lora_b
        stock.update_modules(tree_unflatten([(path, adapter)]))
    stock.train()


@contextmanager
def untouched(model) -> Iterator[None]:
    """mlx-lm's own functions in the modules of its families, where localrl has replaced any."""
    from mlx_lm.models import activations, base, gated_delta, ssm

    own = vars(base) | vars(activations) | vars(gated_delta) | vars(ssm)
    with pytest.MonkeyPatch.context() as patch:
        for name in {type(module).__module__ for module in model.modules()}:
            for key, value in list(vars(sys.modules[name]).items()):
                if (getattr(value, "__module__", None) or "").startswith("localrl"):
                    patch.setattr(sys.modules[name], key, own[key])
        yield


def batch(*groups: Group) -> Batch:
    rewards = [[float(i % 3 == 0) for i in range(len(group.leaves))] for group in groups]
    pairs = [scored(*both) for both in zip(groups, rewards, strict=True)]
    return selection(make_objective(LEARNING), pairs).batch


def continued(group: Group, prompt: tuple[int, ...]) -> Group:
    return replace(group, prompt_ids=prompt)


def trees() -> Batch:
    """Paths of one to three nodes after two prompts; the second tree's nodes have one token."""
    deep = forest([-1, -1, 0, 0, 3, 3], leaves=[1, 2, 4, 5], planned_roots=2, tokens=9)
    small = forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2, tokens=1)
    return batch(continued(deep, PROMPTS[0]), continued(small, PROMPTS[2]))


def flat() -> Batch:
    """Completions that share nothing but their prompts."""
    return batch(*(continued(flat_group(2, [True] * 7), prompt) for prompt in PROMPTS[1:]))


def written_out(model, batch: Batch) -> mx.array:
    """The loss of a step's first update, of the objective "clipped" with the KL "k2".

    - sum_t w_t c_t exp(new_t - first_t) + sum_t k_t (new_t - reference_t)^2 / 2, divided by Z.
    """
    loss, counted = mx.array(0.0), set()
    for end, node in enumerate(batch.nodes):
        if not node.finish:
            continue
        path = [end]
        while batch.nodes[path[0]].parent >= 0:
            path.insert(0, batch.nodes[path[0]].parent)
        tokens = list(batch.prompts[node.prompt])
        starts = {}
        for n in path:
            starts[n] = len(tokens)
            tokens += batch.nodes[n].token_ids.tolist()
        new, reference = logprobs(model, tokens), logprobs_without(model, tokens)
        for n in path:
            if n in counted:
                continue
            counted.add(n)
            own = batch.nodes[n]
            places = slice(starts[n] - 1, starts[n] - 1 + len(own.token_ids))
            first = mx.stop_gradient(new[places])
            weight = mx.minimum(mx.exp(first - mx.array(own.anchor_logprobs)), 2.0)
            ratio = mx.exp(new[places] - first)
            loss = loss - (weight * mx.array(own.coefficients) * ratio).sum()
            apart = new[places] - reference[places]
            loss = loss + (mx.array(own.kl_weights) * mx.square(apart) / 2).sum()
    return loss / batch.z


def logprobs(model, tokens: list[int]) -> mx.array:
    """Of each token but the first."""
    logits = model(mx.array([tokens]))[0, :-1].astype(mx.float32) / TEMPERATURE
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.take_along_axis(logprobs, mx.array(tokens[1:])[:, None], axis=-1)[:, 0]


def logprobs_without(model, tokens: list[int]) -> mx.array:
    """The same of the model without its adapters."""
    adapters = [module for module in model.modules() if hasattr(module, "lora_a")]
    scales = [adapter.scale for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.scale = 0.0
        return mx.stop_gradient(logprobs(model, tokens))
    finally:
        for adapter, scale in zip(adapters, scales, strict=True):
            adapter.scale = scale


@pytest.fixture(scope="module")
def expected(pair):
    """Gradients of trees, and of completions that share a prompt."""
    return [plain_gradient(pair.stock, made) for made in (trees(), flat())]


def plain_gradient(model, made: Batch):
    with untouched(model):
        found: Any = nn.value_and_grad(model, lambda: written_out(model, made))()[1]
        mx.eval(found)
    return found


def gradient(policy, made: Batch, *, shared: bool, recompute: bool = False):
    updater = Updater(policy, LEARNING, TEMPERATURE)
    updater.gradient.shared = shared
    return updater.gradient(made, replace(plan(), grad_checkpoint=recompute))[0]


def test_gradients_of_rows(pair, expected):
    assert (
        relative_difference(gradient(pair.policy, trees(), shared=False), expected[0]) < pair.limit
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_forests(pair, expected, recompute):
    found = gradient(pair.policy, trees(), shared=True, recompute=recompute)
    assert relative_difference(found, expected[0]) < pair.limit


def test_gradients_of_shared_prompts(pair, expected):
    assert relative_difference(gradient(pair.policy, flat(), shared=True), expected[1]) < pair.limit


@pytest.mark.parametrize("shared", [False, True])
def test_logits_after_forks(pair, shared):
    """Prompts padded to one length; rows that fork, leave and come while they are decoded."""
    prompts = PROMPTS[0], LONG[:40], PROMPTS[2]
    tokens = np.zeros((3, 40), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    prefilled = pair.policy.engine.prefill(tokens, [len(prompt) for prompt in prompts])
    names = [0, 1, 2] if shared else None
    state, rows = prefilled.fork(np.array([0, 1, 2, 1]), names), [prompts[n] for n in (0, 1, 2, 1)]
    for keep, more in (([3, 0, 0, 2], 1), ([1, 1, 0], 2)):
        rows = step(state, step(state, rows))
        state.select(np.array(keep))
        state.extend(prefilled.fork(np.array([more]), names))
        rows = [*(rows[n] for n in keep), prompts[more]]
    assert_close(state.logits(), pair.stock, rows)
    for _ in range(3):
        rows = step(state, rows)
    assert_close(state.logits(), pair.stock, rows)


def step(state, rows):
    """One more token of each row."""
    tokens = np.array([4 + (7 * len(row) + 5 * n) % 56 for n, row in enumerate(rows)], np.int32)
    state.step(tokens)
    return [(*row, int(token)) for row, token in zip(rows, tokens, strict=True)]


def assert_close(found, stock, rows):
    with untouched(stock):
        wanted = np.stack([np.array(stock(mx.array([row]))[0, -1]) for row in rows])
    assert np.abs(found - wanted).max() / wanted.std() < LOGITS


def test_the_other_side_is_mlx_lms(pair):
    """Nothing of this package is left in it, and its adapters do something."""
    with untouched(pair.stock):
        for name in {type(module).__module__ for module in pair.stock.modules()}:
            assert name.startswith("mlx")
            used = vars(sys.modules[name]).values()
            assert not [v for v in used if str(getattr(v, "__module__", "")).startswith("localrl")]
        tokens = list(PROMPTS[2])
        assert (
            mx.abs(logprobs(pair.stock, tokens) - logprobs_without(pair.stock, tokens)).max() > 0.01
        )
