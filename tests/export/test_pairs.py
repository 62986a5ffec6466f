"""Pairs of stored rollouts in TRL's preference format."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from localrl.cli.main import cli
from localrl.config import RunConfig
from localrl.errors import ConfigError, DataError
from localrl.export.pairs import export_pairs, pair_of
from localrl.runs.logs import read_jsonl
from localrl.train import train

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]


def record(*rewards, step=3, **changes):
    """A stored group; each completion says its place."""
    leaves = [
        {"node": i, "finish_reason": "stop", "reward": reward, "parts": {}, "text": f"answer {i}"}
        for i, reward in enumerate(rewards)
    ]
    group = {"format": 1, "step": step, "example": "x", "messages": ASKED, "nodes": []}
    return group | {"leaves": leaves} | changes


def stored(folder, *records):
    lines = "".join(json.dumps(line) + "\n" for line in records)
    (folder / "rollouts.jsonl").write_text(lines)
    return folder


def test_the_best_and_the_worst_become_a_pair():
    assert pair_of(record(0.5, 1.0, None, 0.0, 1.0)) == {
        "prompt": ASKED,
        "chosen": [{"role": "assistant", "content": "answer 1"}],
        "rejected": [{"role": "assistant", "content": "answer 3"}],
        "score_chosen": 1.0,
        "score_rejected": 0.0,
        "example": "x",
        "step": 3,
    }


@pytest.mark.parametrize("rewards", [(), (1.0,), (None, None), (0.5, 0.5), (None, 0.5, 0.5, None)])
def test_without_different_rewards_there_is_no_pair(rewards):
    assert pair_of(record(*rewards)) is None


def test_the_same_text_is_not_preferred_to_itself():
    group = record(0.0, 1.0)
    for leaf in group["leaves"]:
        leaf["text"] = "same"
    assert pair_of(group) is None


def test_a_conversation_is_kept_whole():
    said = [{"role": "assistant", "content": "7"}, {"role": "user", "content": "higher"}]
    group = record(0.0, 1.0)
    group["leaves"][1]["messages"] = said
    assert pair_of(group)["chosen"] == said


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.none() | st.sampled_from([-1.0, 0.0, 0.5, 1.0]), max_size=6))
def test_a_pair_has_the_extreme_rewards(rewards):
    pair, known = pair_of(record(*rewards)), [r for r in rewards if r is not None]
    assert (pair is not None) == (len(set(known)) > 1)
    if pair:
        assert (pair["score_chosen"], pair["score_rejected"]) == (max(known), min(known))
        assert pair["chosen"][0]["content"] == f"answer {rewards.index(max(known))}"


def test_each_group_counts_once_and_a_line_being_written_not_at_all(tmp_path):
    again = record(1.0, 0.0, step=4, replayed=True)
    run = stored(tmp_path, record(1.0, 0.0), record(1.0, 1.0), again, record(0.1, 0.2, step=5))
    with (run / "rollouts.jsonl").open("a") as file:
        file.write('{"format": 1, "step": 6, "leav')
    made = export_pairs(run, tmp_path / "new" / "pairs.jsonl")
    assert (made.pairs, made.groups) == (2, 3)
    assert [line["step"] for line in read_jsonl(made.path)] == [3, 5]
    assert [path.name for path in made.path.parent.iterdir()] == ["pairs.jsonl"]


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path):
    run = stored(tmp_path, record(1.0, 0.0))
    out = tmp_path / "mine.jsonl"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        export_pairs(run, out)
    assert out.read_text() == "mine"
    for wrong, why in (
        (record(1.0, 1.0), "None of 1 groups .* has two completions with different rewards"),
        (record(1.0, 0.0, format=2), "line 1 is no group of format 1"),
        ({"format": 1}, "line 1 is no group"),
    ):
        with pytest.raises(DataError, match=why):
            export_pairs(stored(tmp_path, wrong), tmp_path / "new.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.jsonl", "rollouts.jsonl"}
    with pytest.raises(ConfigError, match="There are no rollouts in"):
        export_pairs(tmp_path / "nowhere", tmp_path / "new.jsonl")


def command(*words):
    return CliRunner().invoke(cli, ["export", *map(str, words)])


def test_pairs_of_a_real_run(tmp_path):
    out = tmp_path / "run"
    small = {"run.steps": 1, "task.eval_prompts": 0, "rollout.prompts_per_step": 4}
    short = {"rollout.group_size": 4, "rollout.max_completion_tokens": 40}
    train(RunConfig.create({**small, **short, "run.out": str(out)}))
    done = command(out, "--pairs")
    assert done.exit_code == 0, done.output
    groups, pairs = read_jsonl(out / "rollouts.jsonl"), list(read_jsonl(out / "pairs.jsonl"))
    mixed = [g for g in groups if len({leaf["reward"] for leaf in g["leaves"]}) > 1]
    assert [pair["example"] for pair in pairs] == [group["example"] for group in mixed]
    assert pairs
    assert f"{len(pairs)} of 4 groups gave a pair" in done.output
    for pair, group in zip(pairs, mixed, strict=True):
        texts = {leaf["text"]: leaf["reward"] for leaf in group["leaves"]}
        assert texts[pair["chosen"][0]["content"]] == pair["score_chosen"] > pair["score_rejected"]
    other = command(out, "--pairs", tmp_path / "other.jsonl")
    assert (tmp_path / "other.jsonl").read_bytes() == (out / "pairs.jsonl").read_bytes()
    assert other.exit_code == 0


@pytest.mark.parametrize("words", [("--fused",), ("--gguf",), ("--out", "x"), ("--model", "DIR")])
def test_pairs_stand_alone(tmp_path, words):
    done = command(stored(tmp_path, record(1.0, 0.0)), "--pairs", tmp_path / "p.jsonl", *words)
    assert done.exit_code == 1
    assert "cannot be combined" in str(done.exception) + done.output
