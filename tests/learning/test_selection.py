from __future__ import annotations

import numpy as np
from forests import flat_group, forest, scored

from localrl.learning.credit import assign_credit
from localrl.learning.objectives import OBJECTIVES
from localrl.learning.selection import select

CLIPPED = OBJECTIVES["clipped"]


def test_groups_without_signal_are_dropped_but_still_counted_in_z():
    groups = [scored(flat_group(2), [1, 1]), scored(flat_group(2), [1, 0])]
    selection = select(groups, [assign_credit(group) for group in groups], 2 * 40.0, CLIPPED)
    assert selection.informative == (False, True)
    assert selection.reason(0) is not None
    assert selection.reason(1) is None
    assert len(selection.batch.prompts) == 1
    assert selection.batch.z == 80.0


def test_no_signal_at_all_is_an_empty_batch():
    group = scored(flat_group(2), [0, 0])
    selection = select([group], [assign_credit(group)], 40.0, CLIPPED)
    assert selection.batch.nodes == ()


def test_parents_point_into_the_joint_list():
    first = scored(flat_group(2), [1, 0])
    second = scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2), [0, 1, 0])
    batch = select(
        [first, second], [assign_credit(first), assign_credit(second)], 1.0, CLIPPED
    ).batch
    assert [node.parent for node in batch.nodes] == [-1, -1, -1, -1, 2, 2]
    assert [node.finish for node in batch.nodes] == [True, True, False, True, True, True]
    assert [node.prompt for node in batch.nodes] == [0, 0, 1, 1, 1, 1]
    np.testing.assert_allclose(batch.nodes[0].coefficients, [0.5] * 3)
