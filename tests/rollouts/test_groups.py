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
        ({"strategy": "tree"}, 8, Shape(2, 8)),
        ({"strategy": "tree"}, 2, Shape(2, 2)),
        ({"strategy": "adaptive"}, 8, Shape(2, 2, 4)),
        ({"strategy": "adaptive"}, 2, Shape(2, 2)),
    ],
)
def test_shapes(settings, size, shape):
    assert make_shape(RolloutConfig(**settings, group_size=size)) == shape
    assert shape.planned_roots == shape.roots * shape.rounds


@pytest.mark.parametrize(
    ("strategy", "size", "message"),
    [
        ("tree", 1, "group_size is 1, but a tree has 2 independent roots"),
        ("adaptive", 1, "group_size is 1, which rounds of 2 completions cannot divide"),
        ("adaptive", 7, "group_size is 7, which rounds of 2 completions cannot divide"),
    ],
)
def test_sizes_that_do_not_fit_the_strategy(strategy, size, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_shape(RolloutConfig(strategy=strategy, group_size=size))
    assert caught.value.exit_code == 2


def test_only_shapes_with_forks_have_a_rule():
    config = RolloutConfig(max_completion_tokens=50)
    assert make_rule(config, Shape(4, 4, 2)) is None
    assert make_rule(config, ONE) is None
    rule = make_rule(config, Shape(2, 4, 2))
    assert isinstance(rule, PeriodicRule)
    spacing = rule.spacing
    assert (spacing.roots, spacing.leaves, spacing.expected_length) == (2, 4, 25.0)
    assert isinstance(make_rule(RolloutConfig(fork_rule="entropy"), Shape(1, 2)), EntropyRule)
