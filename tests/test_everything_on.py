"""All ways to save tokens at once, through the whole loop: one truth in every file, every time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import tiny

from localrl import RunConfig, train
from localrl.runs.logs import read_jsonl
from localrl.utils.repetition import repeated_from

BASE = {
    "task.eval_prompts": 0,
    "task.train_prompts": 6,
    "task.cut_reward": -0.25,
    "rollout.prompts_per_step": 3,
    "rollout.group_size": 6,
    "rollout.stop_loops": True,
    "rollout.max_completion_tokens": 56,
    "rollout.max_prompt_tokens": 40,
    "rollout.temperature": 0.4,
    "rollout.reuse": 0.5,
    "learning.lr": 7e-4,
    "learning.warmup_steps": 0,
    "run.steps": 6,
    "run.seed": 2,
}
EVERYTHING = BASE | {
    "rollout.strategy": "adaptive",
    "learning.min_advantage": 0.3,
}
TREES = BASE | {
    "rollout.strategy": "tree",
    "rollout.fork_rule": "entropy",
    "rollout.group_size": 8,
}
VARYING = ("time/", "memory/", "step_time")


@pytest.fixture(scope="module")
def start(tmp_path_factory, engine):
    """A run in which about a third of the completions that end by themselves are right."""
    folder = tmp_path_factory.mktemp("strategies")
    # One token in nine ends a completion: some end, some loop, some are cut off.
    model = tiny.make_folder(folder / "model", eos_token_id=[3, *range(8, 64, 6)])
    source = (
        "def third(completion_ids):\n    return [sum(ids) % 3 == 0 for ids in completion_ids]\n"
    )
    (folder / "third.py").write_text(source)
    third = {"task.rewards": f"{folder / 'third.py'}:third"}

    def run(name, settings, **changes):
        given = {
            **settings,
            **third,
            "model.path": str(model),
            "model.engine": engine,
            "run.out": str(folder / name),
            **changes,
        }
        return train(RunConfig.create(given)).folder

    return run


@pytest.fixture(scope="module")
def everything(start):
    return start("everything", EVERYTHING)


@pytest.fixture(scope="module")
def trees(start):
    return start("trees", TREES)


def metrics(folder):
    return list(read_jsonl(folder / "metrics.jsonl"))


def contents(folder):
    """All that a run leaves, but for what a clock or the machine says."""
    steady = [
        {key: value for key, value in line.items() if not key.startswith(VARYING)}
        for line in metrics(folder)
    ]
    adapter = (folder / "adapter" / "adapters.safetensors").read_bytes()
    return steady, (folder / "rollouts.jsonl").read_bytes(), adapter


@pytest.mark.exact
def test_everything_at_once_can_be_repeated(start, everything):
    assert contents(everything) == contents(start("again", EVERYTHING))


@pytest.mark.exact
def test_trees_can_be_repeated(start, trees):
    assert contents(trees) == contents(start("trees again", TREES))


@pytest.mark.exact
@pytest.mark.parametrize(("name", "settings"), [("everything", EVERYTHING), ("trees", TREES)])
def test_small_batches_sample_the_same(start, name, settings, everything, trees):
    sizes = {"memory.decode_rows": 8, "memory.micro_rows": 2, "run.steps": 2}
    folder = start(f"{name} in small batches", settings, **sizes)
    whole = read_jsonl({"everything": everything, "trees": trees}[name] / "rollouts.jsonl")
    for line, other in zip(read_jsonl(folder / "rollouts.jsonl"), whole, strict=False):
        assert [n["token_ids"] for n in line["nodes"]] == [n["token_ids"] for n in other["nodes"]]


def counted(groups):
    """What a step's metrics must say, counted from its lines of rollouts.jsonl."""
    leaves = [leaf for group in groups for leaf in group["leaves"]]
    reasons = Counter(leaf.get("dropped") for leaf in leaves)
    return {
        "rollout/groups": len(groups),
        "rollout/rounds": 1 + max(n.get("round", 0) for group in groups for n in group["nodes"]),
        "rollout/completions": len(leaves),
        "rollout/tokens": tokens(groups, stale=False),
        "rollout/reused_tokens": tokens(groups, stale=True),
        "selection/trained": reasons[None],
        "selection/no_reward": reasons["no reward"],
        "selection/no_coefficient": reasons["no coefficient"],
        "selection/truncated": reasons["truncated"],
        "reward": pytest.approx(np.mean([leaf["reward"] for leaf in leaves])),
    }


def tokens(groups, *, stale):
    nodes = [n for group in groups for n in group["nodes"] if ("old_logprobs" in n) == stale]
    return sum(len(node["token_ids"]) for node in nodes)


@pytest.mark.parametrize("name", ["everything", "trees"])
def test_every_file_tells_the_same(name, everything, trees):
    folder = {"everything": everything, "trees": trees}[name]
    lines = list(read_jsonl(folder / "rollouts.jsonl"))
    sampled = updates = 0
    for line in metrics(folder):
        groups = [group for group in lines if group["step"] == line["step"]]
        expected = counted(groups)
        assert {key: line[key] for key in expected} == expected
        assert sum(v for k, v in line.items() if k.startswith("selection/")) == sum(
            len(group["leaves"]) for group in groups
        )
        had = line["rollout/tokens"] + line["rollout/reused_tokens"]
        assert had == line["update/trained_tokens"] + line["update/skipped_tokens"]
        sampled += line["rollout/tokens"]
        assert line["num_tokens"] == sampled
        # Stale tokens, and no others, were written before some earlier update.
        for node in (n for group in groups for n in group["nodes"]):
            version = node.get("version", 0)
            assert version == updates or ("old_logprobs" in node and version < updates)
        updates += line["update/applied"]
    assert len(lines) == sum(line["rollout/groups"] for line in metrics(folder))


def test_trained_tokens_are_those_of_kept_completions_up_to_their_loops(everything):
    for line in metrics(everything):
        groups = [g for g in read_jsonl(everything / "rollouts.jsonl") if g["step"] == line["step"]]
        assert line["update/trained_tokens"] == sum(trainable(group) for group in groups)


def trainable(group) -> int:
    """Tokens of the completions that were not dropped; no two of them share any."""
    found = 0
    for leaf in group["leaves"]:
        path, node = [], leaf["node"]
        while node >= 0:
            path.insert(0, group["nodes"][node])
            node = path[0]["parent"]
        ids = [token for node in path for token in node["token_ids"]]
        taught = [node["advantage"] != 0 for node in path for _ in node["token_ids"]]
        if leaf["finish_reason"] == "loop":
            taught = taught[: repeated_from(np.array(ids))]
        found += 0 if "dropped" in leaf else sum(taught)
    return found


def test_everything_did_happen(everything):
    lines = metrics(everything)
    for key in (
        "rollout/reused_tokens",
        "selection/trained",
        "selection/no_coefficient",
        "update/skipped_tokens",
    ):
        assert any(line[key] > 0 for line in lines), key
    assert max(line["rollout/rounds"] for line in lines) > 1
    assert any(line["update/drift"] for line in lines)
    groups = list(read_jsonl(everything / "rollouts.jsonl"))
    leaves = [leaf for group in groups for leaf in group["leaves"]]
    assert {leaf["finish_reason"] for leaf in leaves} == {"stop", "length", "loop"}
    cut = [leaf["reward"] for leaf in leaves if leaf["finish_reason"] != "stop"]
    assert set(cut) == {-0.25}
    assert {leaf["reward"] for leaf in leaves} == {-0.25, 0.0, 1.0}
    # A prefix with a fresh tail: two nodes, of which the first is stale.
    assert any(n["parent"] >= 0 and "old_logprobs" not in n for g in groups for n in g["nodes"])
    # Small advantages were rounded to the least, larger ones were not.
    sizes = {abs(n["advantage"]) for g in groups for n in g["nodes"] if n["advantage"]}
    assert min(sizes) == 0.3
    assert max(sizes) > 0.3


def test_trees_forked_and_began_with_what_was_reused(trees):
    lines = metrics(trees)
    assert any(line["rollout/reused_tokens"] for line in lines)
    assert any(line["tree/saved_tokens"] for line in lines)


SINGLE = {"task.train_prompts": 1, "rollout.prompts_per_step": 1, "learning.min_advantage": 0.0}


def test_a_single_prompt_is_enough(start):
    lines = metrics(start("single", EVERYTHING, **SINGLE, **{"rollout.group_size": 4}))
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert all(line["rollout/groups"] == 1 for line in lines)
    assert any(line["update/applied"] for line in lines)


def test_a_single_completion_of_a_single_prompt_is_enough(start):
    lone = {"rollout.group_size": 1, "rollout.reuse": 0.0, "rollout.strategy": "flat"}
    lines = metrics(start("lone", BASE, **SINGLE, **lone))
    assert all(line["rollout/completions"] == 1 for line in lines)
    # At first there is nothing to compare with, later the tracker.
    assert not lines[0]["update/applied"]
    assert any(line["update/applied"] for line in lines)


def test_whole_completions_are_reused_and_one_stays_fresh(start):
    """A policy that stays as it is accepts all it has written; one of six is sampled anew."""
    settings = {"rollout.reuse": 1.0, "rollout.strategy": "flat", "learning.lr": 0.0}
    folder = start("reuse", EVERYTHING | {"task.train_prompts": 3, "run.steps": 3}, **settings)
    first, *later = metrics(folder)
    assert first["rollout/reused_tokens"] == 0
    for line in later:
        share = line["rollout/reused_tokens"] / (
            line["rollout/tokens"] + line["rollout/reused_tokens"]
        )
        assert 0.6 < share < 1.0
