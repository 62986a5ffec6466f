"""`localrl show` in the terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from waiting import DEADLINE_S

from localrl.report import facts
from localrl.report.compare import comparison, differing
from localrl.report.curves import smoothed, sparkline, tokens_so_far
from localrl.report.reading import Score, read_run
from localrl.report.terminal import overview, samples
from localrl.report.verdict import SMALL, compare, verdict


def localrl(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "localrl", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def is_plain(text):
    return all(c == "\n" or c.isprintable() for c in text)


def test_the_first_thing_is_how_it_went(tree_run):
    lines = list(overview(read_run(tree_run), 100))
    text = "\n".join(lines)
    assert lines[0].endswith("finished after step 2 of 2")
    assert text.index("learned?") < text.index("Reward") < text.index("grad_norm")
    assert "on 4 held-out prompts" in text
    assert "Cannot tell: pass@1" in text
    assert is_plain(text)


def test_samples_page_from_the_last_group_back(tree_run):
    text = "".join(samples(read_run(tree_run)))
    rollouts = [json.loads(line) for line in (tree_run / "rollouts.jsonl").open()]
    heads = [line for line in text.splitlines() if line.startswith("step ")]
    assert len(heads) == 16
    assert [head.split()[1] for head in heads] == ["2"] * 8 + ["1"] * 8
    assert heads[0].split()[2] == rollouts[-1]["example"]
    assert text.count("ended by") == sum(len(line["leaves"]) for line in rollouts)
    assert text.count("reward ") >= text.count("ended by")
    assert "\x1b" in (tree_run / "rollouts.jsonl").read_text().encode().decode("unicode_escape")
    assert is_plain(text)


def test_why_a_completion_was_dropped_is_told(run_copy):
    group = json.loads((run_copy / "rollouts.jsonl").open().readline())
    group |= {"kept": False, "reason": "no reward"}
    for leaf in group["leaves"]:
        leaf |= {"reward": None, "dropped": "no reward"}
    group["leaves"][0]["messages"] = [
        {"role": "assistant", "content": "is it 5"},
        {"role": "user", "content": "lower\x07"},
    ]
    (run_copy / "rollouts.jsonl").write_text(json.dumps(group) + "\n")
    text = "".join(samples(read_run(run_copy)))
    assert "not learned from: no reward" in text.splitlines()[0]
    assert "reward unknown" in text
    assert "assistant: is it 5\n    user: lower\ufffd\n" in text


def test_two_runs_side_by_side(tree_run, tmp_path):
    other = shutil.copytree(tree_run, tmp_path / "other")
    settings = (other / "config.toml").read_text()
    (other / "config.toml").write_text(re.sub(r"(?m)^lr = \S+", "lr = 0.5", settings))
    metrics = [json.loads(line) for line in (other / "metrics.jsonl").open()]
    for line in metrics:
        if "eval/n" in line and line["step"] == 2:
            line |= {"eval/n": 400, "eval/pass@1": 1.0}
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    one, two = read_run(tree_run), read_run(other)
    assert [name for name, *_ in differing(one, two)] == ["learning.lr"]
    text = "\n".join(comparison(one, two, 100))
    assert "learning.lr" in text
    assert "(0.990 to 1.000)" in text
    assert "curves over steps, 0 to 2" in text
    assert "curves over tokens, 0 to " in text
    assert is_plain(text)


def test_runs_of_other_tasks_are_not_ranked(tree_run):
    run = read_run(tree_run)
    other = replace(run, settings={**run.settings, "task.name": "sorting"})
    assert "Cannot tell which is better: the tasks differ." in "\n".join(comparison(run, other))


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        (0.3, 0.9, "Better: pass@1 0.300 before, 0.900 after; the 95 % intervals do not"),
        (0.9, 0.3, "Worse: "),
        (0.5, 0.55, "Cannot tell: "),
        (None, 0.5, "Cannot tell: an evaluation has no judged completion."),
    ],
)
def test_the_verdict(tree_run, first, last, words):
    scores = [Score(step, share, 100, None, None) for step, share in ((0, first), (5, last))]
    assert verdict(replace(read_run(tree_run), scores=scores)).startswith(words)


def asked(passed, prompts="same"):
    """An evaluation with these verdicts."""
    return Score(1, sum(passed) / len(passed), len(passed), None, None, 1.0, prompts, passed)


def test_pairs_tell_more_than_intervals():
    before, after = [True] * 40 + [False] * 60, [True] * 50 + [False] * 50
    told = compare(asked(before), asked(after))
    assert told.startswith("Better: pass@1 0.400 before, 0.500 after on the same 100 prompts")
    assert told.endswith("10 solved only after, 0 only before.")
    assert compare(asked(before), asked(after, "other")).endswith("asked different prompts.")
    assert compare(asked(after), asked(before)).startswith("Worse")
    assert compare(asked(before), asked(after), ("A", "B")).startswith("B is better: ")
    assert compare(asked(before), asked(before)).startswith(f"Not better: {'pass@1'} 0.400")
    assert f"a gain of {SMALL:g} or more is ruled out" in compare(asked(before), asked(before))
    assert "different size (100 and 8 prompts)" in compare(asked(before), asked([True] * 8))


def test_the_newest_run_is_shown(tree_run, tmp_path):
    assert "There is no run under runs" in localrl("show", cwd=tmp_path).stderr
    for name in ("old", "new"):
        shutil.copytree(tree_run, tmp_path / "runs" / name)
        files = [*(tmp_path / "runs" / name).iterdir()]
        for file in files:
            when = 1e9 + (name == "new")
            os.utime(file, (when, when))
    shown = localrl("show", cwd=tmp_path)
    assert shown.stdout.split("\n")[0].split()[1] == "runs/new,"


def test_equal_groups_teach_where_the_tracker_counts(tree_run):
    run = read_run(tree_run)
    assert "can still teach here" in facts.equal_groups(run)
    alone = replace(run, settings={**run.settings, "learning.kappa": 0.0})
    assert "teaches nothing here" in facts.equal_groups(alone)


def test_answers_before_and_after_are_of_the_same_prompts(tree_run):
    found = facts.answers(read_run(tree_run))
    assert len(found) == 4
    assert all(one.after is not None for one in found)
    assert len({one.prompt for one in found}) == 4


def test_warnings(tree_run):
    run = read_run(tree_run)
    assert facts.warnings(replace(run, steps=[])) == []
    bad = {
        "step": 1,
        "rewards/failures": 3,
        "rollout/informative_groups": 1,
        "rollout/groups": 20,
        "completions/clipped_ratio": 0.5,
        "update/applied": False,
        "memory/peak_bytes": 2 * 2**30,
    }
    events = [
        {"kind": "rollouts_thinned", "step": 7, "every": 10},
        {"kind": "code_rewards", "sandbox": "UNSAFE: none"},
        {"kind": "checkpoint_failed", "reason": "disk full"},
        {"kind": "warning", "step": 9, "text": "all rewards are equal"},
        {"kind": "restarted", "reason": "it was aborted"},
    ]
    told = facts.warnings(
        replace(run, steps=[bad], events=events, plan={"limit_bytes": 2**30}, unread={"x": 2})
    )
    for words in (
        "2 lines of x",
        "the last reason: disk full",
        "Step 9: all rewards are equal",
        "restarted from its last checkpoint: it was aborted",
        "From step 7 on, rollouts.jsonl has only every 10th group",
        "without a sandbox",
        "3 reward calls failed",
        "1 of 20 groups",
        "50% of the completions were cut off at 24 tokens",
        "1 made no update",
        "2 GiB, more than the limit of 1 GiB",
    ):
        assert sum(words in line for line in told) == 1, (words, told)
    assert len(told) == 11


def test_numbers_for_people():
    assert facts.number(None) == "unknown"
    assert facts.number(1234567) == "1 234 567"
    assert facts.number(1234.5) == "1 234"
    assert facts.number(1e300) == "1e+300"
    assert facts.number(0.12345) == "0.123"
    assert facts.number(0.00012345) == "0.000123"
    assert facts.with_unit("memory/peak_bytes", 3 * 2**20) == "3 MiB"
    assert facts.with_unit("entropy", 0.5) == "0.500 nats"
    assert facts.with_unit("kl", None) == "unknown"
    assert facts.meaning("rewards/mine/std")[0] == "reward"


def test_curves_by_hand():
    assert sparkline([0.0, None, 0.5, 1.0], 4, 0.0, 1.0) == "▁ ▅█"
    assert sparkline([0.0, 1.0, 1.0, 1.0], 2, 0.0, 1.0) == "▅█"
    assert sparkline([], 5, 0.0, 1.0) == ""
    assert smoothed((0.0,) * 20 + (3.0,) * 20)[19:21] == (1.2, 1.8)
    assert tokens_so_far([{"rollout/tokens": 5}, {}, {"rollout/tokens": 2}]) == [5, 5, 7]


def test_the_command(run_copy):
    shown = localrl("show", run_copy)
    assert shown.returncode == 0, shown.stderr
    assert "finished after step 2 of 2" in shown.stdout
    assert is_plain(shown.stdout)
    written = localrl("show", run_copy, "--report")
    assert written.returncode == 0, written.stderr
    assert "all 16 groups" in written.stdout
    assert (run_copy / "report.html").stat().st_size < 5_000_000
    paged = localrl("show", run_copy, "--samples")
    assert paged.returncode == 0, paged.stderr
    assert is_plain(paged.stdout)


def test_what_does_not_go_together(run_copy, tmp_path):
    for arguments in (("--samples", "--report"), (run_copy, "--report"), ("--out", "x.html")):
        done = localrl("show", run_copy, *arguments)
        assert done.returncode == 2
        assert "Choose one" in done.stderr
    assert "There is no run in" in localrl("show", tmp_path / "none").stderr


def test_an_evaluation_says_how_it_was_sampled_and_other_ways_are_not_ranked(tree_run):
    run = read_run(tree_run)
    assert facts.score_words(run.scores[0]).endswith("held-out prompts, temperature 1")
    other = replace(run, scores=[replace(score, temperature=0.0) for score in run.scores])
    assert facts.score_words(other.scores[0]).endswith("held-out prompts, greedy")
    text = "\n".join(comparison(run, other))
    assert "Cannot tell: they were sampled differently (temperature 1, greedy)." in text
