"""Successful completions of stored groups: those learned, and those left out and counted."""

from __future__ import annotations

import json

import pytest

from localrl.errors import DataError
from localrl.runs.logs import ROLLOUTS_FORMAT
from localrl.tasks.successes import read_successes

NODES = [
    {"parent": -1, "token_ids": [5, 6]},
    {"parent": -1, "token_ids": []},  # an agent's that ended before its first call
    {"parent": -1, "token_ids": [8, 9, 7], "sampled": [False, True, False]},
]


def stored(folder, *leaves):
    record = {
        "format": ROLLOUTS_FORMAT,
        "step": 1,
        "example": "a",
        "messages": [{"role": "user", "content": "2 + 2?"}],
        "prompt_ids": [1, 2],
        "nodes": NODES,
        "leaves": [{"reward": 1.0, "text": "4", **leaf} for leaf in leaves],
    }
    (folder / "rollouts.jsonl").write_text(json.dumps(record) + "\n")
    return folder


UNWHOLE = [
    {"node": 0, "finish_reason": "length"},
    {"node": 0, "finish_reason": "decided"},
    {"node": 0, "finish_reason": "loop"},
    {"node": 1, "finish_reason": "stop"},
]
LEFT_OUT = (
    ", left out of these: 2 cut off for length or repetition, 1 ended early by task.decided, "
    "without their end, 1 without a token of the model"
)


def test_completions_that_are_not_whole_are_left_out_and_counted_by_the_reason(tmp_path):
    whole = {"node": 0, "finish_reason": "stop"}
    found = read_successes(stored(tmp_path, *UNWHOLE, whole, whole | {"reward": 0.0}))
    assert [one.token_ids.tolist() for one in found.written.values()] == [[5, 6]]
    assert str(found).startswith(f"5 of 6 completions in 1 groups are successful{LEFT_OUT}; 1 ")
    with pytest.raises(DataError, match=f"whole: 4 of 4 passed{LEFT_OUT}. Learn from"):
        read_successes(stored(tmp_path, *UNWHOLE))


def test_every_sequence_of_an_agents_completion_is_a_conversation(tmp_path):
    leaf = {"node": 0, "finish_reason": "stop", "beside": [2]}
    found = read_successes(stored(tmp_path, leaf))
    learned = [(o.token_ids.tolist(), o.by_model.tolist()) for o in found.written.values()]
    assert learned == [([5, 6], [True, True]), ([8, 9], [False, True])]
    assert len({example.id for example in found.examples}) == 2
