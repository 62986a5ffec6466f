"""Trees through the whole loop: what is refused, what is logged, and that the log redraws them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localrl import RunConfig, train
from localrl.backend import mx, tree_flatten
from localrl.errors import ConfigError
from localrl.learning.credit import assign_credit
from localrl.records import Example, Group, Leaf, Node, ScoredGroup
from localrl.runs.logs import read_jsonl

SETTINGS = {
    "rollout.strategy": "tree",
    "rollout.fork_rule": "entropy",
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 6,
    "rollout.max_completion_tokens": 16,
    "rollout.max_prompt_tokens": 40,
    "task.eval_prompts": 0,
    "learning.lr": 1e-3,
    "run.steps": 3,
}


@pytest.fixture
def run(tiny_folder, tmp_path, engine):
    """A run that rewards short completions."""
    short = {"task.rewards": f"{Path(__file__).parent / 'worker_functions.py'}:short"}

    def start(name="run", **changes):
        settings = {**SETTINGS, **short, "model.path": str(tiny_folder), "model.engine": engine}
        settings["run.out"] = str(tmp_path / name)
        return train(RunConfig.create({**settings, **changes})).folder

    return start


def steps(folder):
    return list(read_jsonl(folder / "metrics.jsonl"))


def redraw(line) -> ScoredGroup:
    """The group of one line of rollouts.jsonl."""
    nodes = []
    for entry in line["nodes"]:
        tokens = np.array(entry["token_ids"], np.int32)
        logprobs = np.array(entry["sampled_logprobs"], np.float32)
        entropies = np.array(entry["entropies"], np.float32)
        sampled = np.ones(len(tokens), bool)
        weight = entry.get("cond_weight", 1.0)
        nodes.append(Node(entry["parent"], tokens, sampled, logprobs, entropies, weight))
    leaves = tuple(Leaf(e["node"], e["finish_reason"], e["text"]) for e in line["leaves"])
    example = Example(id=line["example"], messages=tuple(line["messages"]))
    group = Group(example, (), tuple(nodes), leaves, line["planned_roots"])
    rewards = tuple(entry["reward"] for entry in line["leaves"])
    return ScoredGroup(group, rewards, {})


@pytest.mark.parametrize("rule", ["entropy", "periodic"])
def test_the_log_is_enough_to_redraw_every_tree(run, tiny_folder, rule):
    from localrl.policy.tokenizer import load_tokenizer

    folder = run(**{"rollout.fork_rule": rule, "learning.kappa": 0.0})
    tokenizer = load_tokenizer(tiny_folder)
    forked = 0
    for line in read_jsonl(folder / "rollouts.jsonl"):
        scored = redraw(line)
        group = scored.group
        forked += any(node.parent >= 0 for node in group.nodes)
        for leaf, completion in zip(group.leaves, group.completions(), strict=True):
            ids = completion.token_ids.tolist()
            body = ids[:-1] if leaf.finish_reason == "stop" else ids
            assert tokenizer.decode(body) == leaf.text
        # Its credit comes out again: the weights, and the advantages that were logged.
        credit = assign_credit(scored)
        logged = [entry["advantage"] for entry in line["nodes"]]
        assert credit.advantages == pytest.approx(logged, abs=1e-4)
        assert sum(node.parent < 0 for node in group.nodes) == group.planned_roots == 2
        assert sum(credit.weights[leaf.node] for leaf in group.leaves) == pytest.approx(1)
    assert forked


def test_what_trees_save_is_counted(run):
    folder = run()
    lines = steps(folder)
    groups = [redraw(line) for line in read_jsonl(folder / "rollouts.jsonl") if line["step"] == 3]
    paths = sum(len(c) for scored in groups for c in scored.group.completions())
    tokens = sum(len(node.token_ids) for scored in groups for node in scored.group.nodes)
    assert lines[0]["tree/saved_tokens"] == 0  # nothing forks before a batch has been seen
    assert lines[-1]["tree/saved_tokens"] == paths - tokens > 0
    assert lines[-1]["rollout/tokens"] == tokens
    assert lines[-1]["tree/forks_per_path"] > 0
    assert lines[-1]["update/saved_positions"] > paths - tokens  # prompts are shared as well


def test_flat_groups_save_prompts_alone(run):
    line = steps(run(**{"rollout.strategy": "flat"}))[-1]
    assert line["tree/saved_tokens"] == 0 == line["tree/forks_per_path"]
    assert line["update/saved_positions"] > 0


@pytest.mark.exact
def test_decode_batch_sizes_change_neither_ids_nor_the_update(run):
    folders = [run(str(rows), **{"memory.decode_rows": rows, "run.steps": 2}) for rows in (24, 7)]
    one, other = (list(read_jsonl(folder / "rollouts.jsonl")) for folder in folders)
    for a, b in zip(one, other, strict=True):
        assert [n["token_ids"] for n in a["nodes"]] == [n["token_ids"] for n in b["nodes"]]
        for n, m in zip(a["nodes"], b["nodes"], strict=True):
            np.testing.assert_allclose(n["sampled_logprobs"], m["sampled_logprobs"], atol=2e-4)
    norms = [[line["grad_norm"] for line in steps(folder)] for folder in folders]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_trees_learn(run):
    folder = run(**{"run.steps": 20, "learning.lr": 5e-3, "rollout.prompts_per_step": 8})
    rewards = [line["reward"] for line in steps(folder)]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory.decode_rows": 5}, "a tree may have 6 leaves at once"),
        ({"rollout.group_size": 1}, "group_size is 1, but a tree has 2 independent roots"),
        ({"learning.objective": "grpo"}, "learning.objective is grpo, which divides by the length"),
        ({"learning.objective": "gspo"}, "learning.objective is gspo"),
        ({"rollout.strategy": "adaptive-tree"}, "must be flat, tree or adaptive"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(run, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(**changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.exact
def test_gradients_of_different_decode_batches_agree(tiny_folder, tmp_path):
    """From equal weights, the gradient itself, not only its norm."""
    import tiny
    from steps import gradient

    from localrl.rollouts.decode import Decoder
    from localrl.rollouts.forking import PeriodicRule, Spacing
    from localrl.rollouts.groups import Shape, sample_groups

    policy = tiny.make_tiny_policy(tmp_path / "model")
    examples = [Example(id=t, messages=({"role": "user", "content": t},)) for t in ("1", "sum 2")]

    def sampled(rows):
        return sample_groups(
            Decoder(policy, 0.8, rows),
            examples,
            [policy.tokenizer.encode(example.messages) for example in examples],
            Shape(2, 6),
            rule=PeriodicRule(Spacing(2, 6, 12.0)),
            max_completion_tokens=20,
            seed=0,
            step=1,
            version=0,
        )

    found = []
    for rows in (12, 6):
        groups = [
            ScoredGroup(group, tuple(float(c.token_ids.sum() % 3) for c in group.completions()), {})
            for group in sampled(rows)
        ]
        assert any(len(group.group.nodes) > 2 for group in groups)
        found.append(dict(tree_flatten(gradient(policy, groups)[0])))
    for name, one in found[0].items():
        difference = mx.linalg.norm(one - found[1][name])
        assert difference.item() <= 1e-5 * mx.linalg.norm(one).item() + 1e-9


def test_one_leaf_alone_is_judged_by_the_tracker():
    root = Node(-1, np.array([4, 5]), np.ones(2, bool), -np.ones(2, np.float32), np.ones(2))
    nodes = (replace(root, expected_reward=0.25),)
    group = Group(Example(id="x", messages=()), (1,), nodes, (Leaf(0, "stop", ""),), 1)
    credit = assign_credit(ScoredGroup(group, (1.0,), {}), kappa=4.0)
    assert credit.advantages == pytest.approx([0.75])
    assert credit.weights == (1.0,)
