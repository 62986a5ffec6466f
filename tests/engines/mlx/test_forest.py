"""The forest update against plain rows, over families, and what it saves."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from forests import flat_group, forest, scored

from localrl.backend import mx, nn, tree_flatten
from localrl.engines.mlx.forest import LevelState
from localrl.learning.credit import assign_credit
from localrl.learning.objectives import make_objective
from localrl.learning.selection import select
from localrl.learning.update import Updater, global_norm
from localrl.policy.forest_packing import pack_forest
from localrl.policy.packing import forest_batches, row_batches
from localrl.policy.scoring import forest_agrees
from localrl.records import Batch, Group, MemoryPlan, ScoredGroup
from localrl.settings import LearningConfig

WIDE = LearningConfig(clip_low=1.0, clip_high=100.0)


def plan(micro_rows=4) -> MemoryPlan:
    return MemoryPlan(8, 8, 8, micro_rows, 16, 64, 40, False, True, None, None, None, "")


def make_batch(*groups: ScoredGroup) -> Batch:
    credits = [assign_credit(group) for group in groups]
    return select(groups, credits, 40.0, make_objective(WIDE)).batch


def with_prompt(group: Group, prompt: tuple[int, ...]) -> Group:
    return Group(group.example, prompt, group.nodes, group.leaves, group.planned_roots)


def batch() -> Batch:
    """Uneven trees, flat groups, an empty node at a fork, long and one-token prompts."""
    deep = forest([-1, -1, 0, 0, 3, 3, 1, 1], leaves=[2, 4, 5, 6, 7], planned_roots=2, tokens=9)
    empty = forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2, tokens=4)
    hollow = [
        type(n)(n.parent, *(getattr(n, f)[: 0 if i == 0 else 4] for f in FIELDS), n.cond_weight)
        for i, n in enumerate(empty.nodes)
    ]
    empty = Group(empty.example, empty.prompt_ids, tuple(hollow), empty.leaves, 2)
    return make_batch(
        scored(with_prompt(deep, (1, *range(5, 25), 2)), [1, 0, 1, 0, 0]),
        scored(with_prompt(empty, (2,)), [1, 0, 0]),
        scored(flat_group(4), [1, 0, 0, 1]),
        scored(with_prompt(forest([-1, -1, 0, 0], [1, 2, 3], 2, 6), (1, 9, 9, 2)), [0, 0, 1]),
    )


FIELDS = ("token_ids", "sampled", "sampled_logprobs", "entropies")


def relative_difference(one, other) -> float:
    a, b = dict(tree_flatten(one)), dict(tree_flatten(other))
    return global_norm({name: a[name] - b[name] for name in b}) / global_norm(b)


def gradients(policy):
    found = []
    for shared in (True, False):
        updater = Updater(policy, WIDE, 0.8)
        updater.gradient.shared = shared
        gradient, total = updater.gradient(batch(), plan())
        found.append((gradient, total))
    return found


@pytest.mark.parametrize(
    "name", ["qwen3", "llama", "gemma3_text", "gemma4_text", "lfm2", "qwen3_5"]
)
def test_loss_and_gradient_equal_plain_rows(tmp_path, name):
    policy = tiny.make_tiny_policy(tmp_path / name, **tiny.FAMILIES[name])
    assert forest_agrees(policy, batch(), temperature=0.8, head_chunk=16)
    (shared, total), (rows, plain) = gradients(policy)
    assert relative_difference(shared, rows) < 1e-5
    assert total.loss == pytest.approx(plain.loss, rel=1e-5)
    assert total.tokens == plain.tokens
    assert total.saved_positions > 0 == plain.saved_positions


def test_through_quantised_weights(tmp_path):
    from localrl.engines.open import make_policy
    from localrl.policy.model import load_model

    loaded = load_model(tiny.make_folder(tmp_path / "model"))
    policy = make_policy(loaded, rank=4, scale=2.0, seed=0, for_cpu=True, dense=False)
    tiny.stir(policy.model, 0)
    assert isinstance(policy.model.layers[0].mlp.up_proj.linear, nn.QuantizedLinear)
    (shared, _), (rows, _) = gradients(policy)
    assert relative_difference(shared, rows) < 1e-4


def test_a_family_that_keeps_more_falls_back_to_rows_and_says_so(tmp_path, monkeypatch):
    policy = tiny.make_tiny_policy(tmp_path / "lfm2", **tiny.FAMILIES["lfm2"])
    monkeypatch.setattr(LevelState, "_begin", lambda self, parents: None)  # the states are lost
    warnings: list[str] = []
    updater = Updater(policy, WIDE, 0.8, warnings.append)
    first, _ = updater.gradient(batch(), plan())
    second, _ = updater.gradient(batch(), plan())
    assert updater.gradient.shared is False
    assert len(warnings) == 1
    assert relative_difference(first, second) == 0


def test_a_family_that_computes_something_else_is_caught(policy, monkeypatch):
    from localrl.engines.mlx.forest import LevelCache

    def deaf(self, n, window_size=None, **_):
        rows, ancestors = self._valid.shape
        return mx.zeros((rows, 1, n, ancestors + n), dtype=mx.bool_)

    assert forest_agrees(policy, batch(), temperature=0.8, head_chunk=16)
    monkeypatch.setattr(LevelCache, "make_mask", deaf)
    assert not forest_agrees(policy, batch(), temperature=0.8, head_chunk=16)


def test_positions_are_counted():
    # A prompt of 4; two roots of 3 tokens, the first with two children of 3.
    tree = scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2), [0, 1, 0])
    (packed,) = pack_forest(make_batch(tree), 100)
    # The prompt but its last token, and as many inputs as tokens.
    assert packed.layout.positions == 3 + 4 * 3
    assert packed.row_positions == (4 + 3) + 2 * (4 + 3 + 3)
    (micro,) = forest_batches(make_batch(tree), 100)
    assert micro.saved_positions == 27 - 15


def test_every_trained_token_is_there_once_however_it_is_packed():
    wanted = sorted(
        (float(c), int(t)) for node in batch().nodes
        for c, t in zip(node.coefficients, node.token_ids, strict=True) if c
    )  # fmt: skip
    for pack in (forest_batches, row_batches):
        for size in (1, 3, 100):
            micros = list(pack(batch(), size))
            found = sorted(
                (float(c), int(t)) for micro in micros
                for c, t in zip(micro.coefficients, micro.targets, strict=True)
            )  # fmt: skip
            assert found == wanted


def test_what_teaches_nothing_is_not_computed():
    # The second root's reward equals its siblings' mean: no coefficient, no branch.
    group = scored(flat_group(3), [1, 0.5, 0])
    (packed,) = pack_forest(make_batch(group), 100)
    assert len(packed.nodes) == 2
    assert packed.layout.positions == 3 + 2 * 3


def test_a_prompt_is_shared_by_its_trees():
    (packed,) = pack_forest(make_batch(scored(flat_group(4), [1, 0, 0, 1])), 100)
    assert [level.tokens.shape for level in packed.layout.levels] == [(1, 3), (4, 3)]
    np.testing.assert_array_equal(packed.layout.levels[1].parents, [0, 0, 0, 0])
