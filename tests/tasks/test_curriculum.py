"""Thompson order as a curriculum: levels that are open come most."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from forests import flat_group, scored

from localrl.learning.credit import assign_credit
from localrl.learning.tracker import Tracker
from localrl.tasks.builtin import load_task
from localrl.tasks.order import choose, take

RIGHT = {1: 8, 2: 6, 3: 4, 4: 2, 5: 0}
"""Right answers among eight, by level: the first is solved, the last hopeless."""


def test_levels_that_are_neither_solved_nor_hopeless_come_most():
    task, tracker = load_task("arithmetic", train_prompts=0), Tracker()
    for example in take(task, 0, 50, seed=0):
        right = RIGHT[example.columns["difficulty"]]
        group = scored(replace(flat_group(8), example=example), [1.0] * right + [0.0] * (8 - right))
        tracker.update([group], [assign_credit(group)])
    chosen = Counter(
        example.tracker_key
        for step in range(1, 21)
        for example in choose(
            task,
            step,
            8,
            0,
            uniform_share=0.1,
            worth=lambda examples, step=step: tracker.worth(examples, 0, step, "prompts"),
        )
    )
    by_level = [chosen[f"arithmetic/{level}"] for level in (1, 2, 3, 4, 5)]
    assert by_level[2] == max(by_level)
    assert sum(by_level[1:4]) > 0.85 * sum(by_level)
    assert min(by_level[1:4]) > 2 * max(by_level[0], by_level[4])
