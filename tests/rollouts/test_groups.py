"""The shape of a group, as it follows from the settings."""

from __future__ import annotations

import pytest

from localrl.errors import ConfigError
from localrl.rollouts.forking import EntropyRule, PeriodicRule, make_rule
from localrl.rollouts.groups import ONE, Shape, make_shape
from localrl.settings import RolloutConfig


@pytest.mark.parametrize(
    ("settings", "size", "shape"),
    [
        ({}, 8, Shape(8, 8)),
        ({}, 1, ONE),
        ({"roots": 9, "rounds": 3}, 8, Shape(8, 8)),  # neither is a flat group's business
        ({"strategy": "tree"}, 8, Shape(2, 8)),
        ({"strategy": "tree", "roots": 8}, 8, Shape(8, 8)),
        ({"strategy": "tree", "roots": 1}, 8, Shape(1, 8)),
        ({"strategy": "adaptive"}, 8, Shape(2, 2, 4)),
        ({"strategy": "adaptive"}, 2, Shape(2, 2)),
        ({"strategy": "adaptive", "rounds": 2}, 8, Shape(4, 4, 2)),
        ({"strategy": "adaptive", "rounds": 8}, 8, Shape(1, 1, 8)),
        ({"strategy": "adaptive", "rounds": 1}, 8, Shape(8, 8)),
        ({"strategy": "adaptive-tree"}, 8, Shape(2, 4, 2)),
        ({"strategy": "adaptive-tree", "roots": 1, "rounds": 4}, 8, Shape(1, 2, 4)),
    ],
)
def test_shapes(settings, size, shape):
    assert make_shape(RolloutConfig(**settings, group_size=size)) == shape
    assert shape.planned_roots == shape.roots * shape.rounds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "tree", "roots": 9}, "roots is 9, more than the 8 completions that rollout"),
        ({"strategy": "adaptive-tree", "roots": 5}, "roots is 5, more than the 4 completions per"),
        ({"strategy": "adaptive", "rounds": 3}, "group_size is 8, which 3 rounds cannot divide"),
        ({"strategy": "adaptive", "rounds": 16}, "group_size is 8, which 16 rounds cannot divide"),
        ({"strategy": "adaptive-tree", "rounds": 5}, "group_size is 8, which 5 rounds cannot"),
    ],
)
def test_numbers_that_do_not_go_together(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_shape(RolloutConfig(**{"group_size": 8} | settings))
    assert caught.value.exit_code == 2


def test_only_shapes_with_forks_have_a_rule():
    config = RolloutConfig(max_completion_tokens=50, fork_gap=7)
    assert make_rule(config, Shape(4, 4, 2)) is None
    assert make_rule(config, ONE) is None
    rule = make_rule(config, Shape(2, 4, 2))
    assert isinstance(rule, EntropyRule)
    spacing = rule.spacing
    assert (spacing.roots, spacing.leaves, spacing.gap, spacing.expected_length) == (2, 4, 7, 25.0)
    assert isinstance(make_rule(RolloutConfig(fork_rule="periodic"), Shape(1, 2)), PeriodicRule)
