"""Rules that end completions, prefixes, and allocations: what each says of plain cases."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from localrl.records import Example

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from allocation import allocate
from deciding import bare_object, first_object, work
from prefixes import half_way, worth


def problem(family: str, text: str, answer: str) -> Example:
    messages = ({"role": "user", "content": text},)
    return Example(id=text, messages=messages, answer=answer, columns={"family": family})


SUM = problem("sums", "sum 47 85 36", "168")
SORT = problem("sorting", "sort kgba", "abgk")


@pytest.mark.parametrize(
    ("example", "kept", "rest"),
    [
        (SUM, "740;+58=231;+63=861;#168", ""),
        (SUM, "740;?=231;?=861;#168", ""),
        (SUM, "740;?=22", "1;?=851;#158"),
        (SUM, "741", ";?=222;?=852;#258"),
        (SUM, "740;+58=231;+63=861;#169", ""),
        (SUM, "740;+58=23;", "+63=861;#168"),
        (SUM, "740;+58=231;+63=861;+", "63=421;#124"),
        (SORT, "kgba;kgba>a;?>b;kg>g;#abgk", ""),
        (SORT, "kgba;?>b", ";kga>a;kg>g;#bagk"),
        (SORT, "kgba;xy>a;?>b;;", "#abgk"),
    ],
)
def test_work(example, kept, rest):
    """A completion is kept up to the first character that decides."""
    text = kept + rest
    decides = (n for n in range(1, len(text) + 1) if work(text[:n], example))
    assert text[: next(decides, len(text))] == kept


def test_objects():
    gold = problem("extraction", "who", '{"a": 1}')
    assert not first_object('Here: {"a": ', gold)
    assert first_object('Here: {"a": 2}', gold)
    assert bare_object("H", gold)
    assert not bare_object('\n{"a": {"b": 1}}\n', gold)
    assert bare_object('{"a": 1} is', gold)
    assert not bare_object("", gold)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.45, 0.5, 0.6, 0.95, 1.0])
def test_prefixes_lead_half_way(p):
    assert 0 <= half_way(p) <= 0.5
    assert worth(p, half_way(p), succeeded=p < 0.5) == pytest.approx(0.5)


def test_allocation():
    assert allocate(np.ones(4), 8) == [2, 2, 2, 2]
    assert allocate(np.array([0.0, 1.0, 3.0]), 9) == [1, 2, 6]
    assert allocate(np.array([5.0, 1.0, 1.0, 1.0]), 4) == [1, 1, 1, 1]
    assert sum(allocate(np.array([0.3, 0.41, 0.1, 0.7, 0.2]), 16)) == 16
