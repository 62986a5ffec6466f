from __future__ import annotations

import numpy as np

from localrl.policy.packing import pack, row_batches, rows_of
from localrl.records import Batch, BatchNode


def batch_node(prompt, parent, tokens, coefficients, finish=True, kl_weights=None):
    return BatchNode(
        prompt=prompt,
        parent=parent,
        token_ids=np.array(tokens, np.int32),
        coefficients=np.array(coefficients, np.float32),
        anchor_logprobs=-np.array(tokens, np.float32),
        finish=finish,
        kl_weights=np.array(kl_weights or [0] * len(tokens), np.float32),
    )


def test_targets_are_the_completion_tokens_and_sources_one_place_before():
    batch = Batch(
        prompts=((7, 8), (9,)),
        nodes=(batch_node(0, -1, [5, 6], [1, 1]), batch_node(1, -1, [5, 6, 3], [-1, -1, -1])),
        z=1.0,
    )
    packed = pack(rows_of(batch))
    assert packed.tokens.tolist() == [[7, 8, 5, 6], [9, 5, 6, 3]]
    assert packed.targets.tolist() == [5, 6, 5, 6, 3]
    # Flattened (2, 4): the 5 of row 0 is predicted at its place 1, that of row 1 at 4 + 0.
    assert packed.sources.tolist() == [1, 2, 4, 5, 6]
    assert packed.anchor_logprobs.tolist() == [-5, -6, -5, -6, -3]


def test_a_foreign_token_is_context_and_no_target():
    batch = Batch(((7,),), (batch_node(0, -1, [4, 5, 6], [2, 0, 2]),), 1.0)
    packed = pack(rows_of(batch))
    assert packed.tokens.tolist() == [[7, 4, 5, 6]]
    assert packed.targets.tolist() == [4, 6]
    assert packed.sources.tolist() == [0, 2]


def test_a_shared_node_counts_once():
    batch = Batch(
        prompts=((7,),),
        nodes=(
            batch_node(0, -1, [4, 5], [1, 1], finish=False),
            batch_node(0, 0, [6], [2]),
            batch_node(0, 0, [3], [3]),
        ),
        z=1.0,
    )
    packed = pack(rows_of(batch))
    assert packed.tokens.tolist() == [[7, 4, 5, 6], [7, 4, 5, 3]]
    assert packed.targets.tolist() == [4, 5, 6, 3]
    assert packed.coefficients.tolist() == [1, 1, 2, 3]


def test_rows_without_coefficients_are_left_out():
    batch = Batch(((7,),), (batch_node(0, -1, [4], [0]), batch_node(0, -1, [5], [1])), 1.0)
    assert [row.token_ids.tolist() for row in rows_of(batch)] == [[7, 5]]


def test_a_token_with_only_a_kl_weight_is_a_target():
    batch = Batch(((7,),), (batch_node(0, -1, [4, 5, 6], [0, 2, 0], kl_weights=[1, 1, 0]),), 1.0)
    packed = pack(rows_of(batch))
    assert packed.targets.tolist() == [4, 5]
    assert packed.coefficients.tolist() == [0, 2]
    assert packed.kl_weights.tolist() == [1, 1]


def test_targets_know_their_row():
    nodes = (batch_node(0, -1, [4, 5, 6], [1, 0, 1]), batch_node(0, -1, [5], [1]))
    assert pack(rows_of(Batch(((7,),), nodes, 1.0))).rows.tolist() == [0, 0, 1]


def test_micro_batches_hold_rows_of_like_length():
    nodes = tuple(batch_node(0, -1, [4] * n, [1] * n) for n in (5, 1, 4, 2, 3))
    packed = list(row_batches(Batch(((7,),), nodes, 1.0), 2))
    assert [micro.tokens.shape for micro in packed] == [(2, 3), (2, 5), (1, 6)]
    assert sum(len(micro.targets) for micro in packed) == 15
