"""The longest prompt of a task, as the plan counts with it."""

from __future__ import annotations

import json
import re

import pytest

from localrl.config import RunConfig
from localrl.errors import DataError
from localrl.memory.plan import PromptLength
from localrl.policy.tokenizer import load_tokenizer
from localrl.tasks.builtin import load_task
from localrl.tasks.order import take
from localrl.training import prompt_lengths
from localrl.training.prompt_lengths import find, read_prompts


def lengths(tokenizer, examples):
    return [len(tokenizer.encode(example.messages)) for example in examples]


def config(folder, **changes):
    return RunConfig.create({"model.path": str(folder), "task.eval_prompts": 4, **changes})


def data(tmp_path, texts):
    """Rows of a task with these prompts and nothing held out."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": t, "answer": "1"}) + "\n" for t in texts))
    return {"task.name": str(file), "task.eval_prompts": 0}


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return load_tokenizer(tiny_folder)


def test_all_prompts_of_a_fixed_set_are_measured(tiny_folder, tokenizer):
    task = load_task("sums", train_prompts=20)
    held_out = task.evaluation(4)
    same, found = read_prompts(config(tiny_folder), task, tokenizer)
    assert same is task
    longest = max(lengths(tokenizer, [*map(task.train, range(20)), *held_out]))
    assert found == PromptLength(longest, "measured on all 24 of them")
    assert str(found) == f"prompts of up to {longest} tokens, measured on all 24 of them"
    _, alone = read_prompts(config(tiny_folder), task, tokenizer, trains=False)
    assert alone.tokens == max(lengths(tokenizer, held_out))


def test_an_endless_task_is_measured_where_the_run_begins_and_leaves_a_margin(
    tiny_folder, tokenizer, monkeypatch
):
    monkeypatch.setattr(prompt_lengths, "ENDLESS", 8)
    task, none = load_task("sums", train_prompts=0), {"task.eval_prompts": 0}
    for seed in (0, 5):
        _, found = read_prompts(config(tiny_folder, **{**none, "run.seed": seed}), task, tokenizer)
        longest = max(lengths(tokenizer, take(task, 0, 8, seed)))
        assert longest * 9 / 8 <= found.tokens <= longest * 9 / 8 + 1
        assert found.basis == f"measured on 8 of them, the longest of which has {longest}"
    tight = config(tiny_folder, **{**none, "rollout.max_prompt_tokens": longest})
    assert read_prompts(tight, task, tokenizer)[1].tokens == longest


def test_a_prompt_that_is_too_long_is_refused_at_once(tiny_folder, tmp_path):
    wish = config(tiny_folder, **data(tmp_path, ["1", "4444444"]))
    with pytest.raises(
        DataError, match=r"has 9 tokens; 1 to 8 are allowed\. Raise rollout\.max_pr"
    ):
        find(wish.replace("rollout.max_prompt_tokens", 8))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model.path": "acme/none"}, "The model 'acme/none' is not on this machine"),
        ({"task.name": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"task.name": "calculator", "model.path": "turns-0.1m"}, "an environment may add to them"),
    ],
)
def test_what_cannot_be_measured_counts_as_long_as_is_allowed(tiny_folder, changes, why):
    found = find(config(tiny_folder, **{"rollout.max_prompt_tokens": 99, **changes}))
    assert found.tokens == 99
    assert re.match(r"rollout\.max_prompt_tokens \(.*\)$", found.basis)
    assert why in found.basis
