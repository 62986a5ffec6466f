"""The example that is one file takes the library's gradient, and runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from forests import scored
from steps import LMAX, TEMPERATURE, gradient, ragged_group, relative_difference

from localrl.backend import mx, nn, tree_flatten

FILE = Path(__file__).parent.parent / "examples" / "grpo_in_one_file.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(FILE))


def test_its_gradient_is_the_librarys(policy, example):
    """For ragged groups, one of them without anything to learn, with ratios on both sides."""
    rewards = ([1, 0, 0.25, 0], [1, 1, 1], [0, 1])
    groups = [
        scored(ragged_group(lengths, first), r)
        for lengths, first, r in zip(
            ((5, 9, 3, 1), (2, 3, 4), (7, 2)), (4, 9, 14), rewards, strict=True
        )
    ]
    expected, value = gradient(policy, groups, objective="clipped")
    assert max(mx.abs(array).max().item() for _, array in tree_flatten(expected)) > 0
    plain = [
        example["Group"](
            list(group.group.prompt_ids),
            [completion.token_ids.tolist() for completion in group.group.completions()],
            [completion.sampled_logprobs for completion in group.group.completions()],
            list(group.rewards),
        )
        for group in groups
    ]
    # The library weighs prompts alike, and this file completions: groups of one size are the same.
    parts = [
        nn.value_and_grad(policy.model, example["loss"])(policy.model, [one], TEMPERATURE, LMAX)
        for one in plain
    ]
    found = {name: array / len(plain) for name, array in tree_flatten(parts[0][1])}
    for _, more in parts[1:]:
        for name, array in tree_flatten(more):
            found[name] = found[name] + array / len(plain)
    assert relative_difference(found, dict(tree_flatten(expected))) < 1e-5
    assert np.mean([part[0].item() for part in parts]) == pytest.approx(value, rel=1e-5)


def test_it_runs(example, capsys):
    example["main"].__globals__.update(STEPS=2, PROMPTS=1, GROUP=2)
    example["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "1"], ["step", "2"]]
    assert all(0 <= float(line.split()[3]) <= 1 for line in lines)
