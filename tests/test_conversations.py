"""Whole runs in which completions talk to environments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from localrl.config import RunConfig
from localrl.errors import ConfigError
from localrl.runs.logs import read_jsonl
from localrl.train import train

PLAYGROUND = Path(__file__).parent / "tasks" / "playground.py"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<assistant>{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}"
    "<tool_call>{{ tool_call.name }}</tool_call>{% endfor %}<end>"
    "{% else %}<user>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that knows tool calls, and data with a column for the environment."""
    folder = tmp_path_factory.mktemp("talks")
    tiny.make_folder(folder / "model", template=TEMPLATE, extra=("<tool_call>", "</tool_call>"))
    rows = [{"prompt": f"count {n}", "start": n, "answer": str(n)} for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(folder, out, **settings):
    config = RunConfig.create(
        {
            "model.path": str(folder / "model"),
            "task.name": str(folder / "rows.jsonl"),
            "task.environment": f"{PLAYGROUND}:Countdown",
            "task.eval_prompts": 2,
            "rollout.prompts_per_step": 3,
            "rollout.group_size": 4,
            "rollout.max_completion_tokens": 40,
            "rollout.max_turns": 3,
            "learning.lr": 0.01,
            "run.steps": 2,
            "run.out": str(out),
            **settings,
        }
    )
    return train(config)


STRATEGIES = {
    "flat": {},
    "tree": {"rollout.strategy": "tree", "rollout.fork_rule": "entropy"},
    "adaptive": {"rollout.strategy": "adaptive"},
}


@pytest.mark.exact
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_conversations_train_and_can_be_repeated(folder, tmp_path, strategy, engine):
    settings = STRATEGIES[strategy] | {"model.engine": engine}
    first = run(folder, tmp_path / "a", **settings)
    second = run(folder, tmp_path / "b", **settings, **{"memory.decode_rows": 5})
    adapters = [r.folder / "adapter" / "adapters.safetensors" for r in (first, second)]
    lines = [list(read_jsonl(r.folder / "rollouts.jsonl")) for r in (first, second)]
    assert [ids(line) for line in lines[0][:3]] == [ids(line) for line in lines[1][:3]]
    again = run(folder, tmp_path / "c", **settings)
    assert adapters[0].read_bytes() == (again.folder / "adapter/adapters.safetensors").read_bytes()
    for line in lines[0]:
        for leaf in line["leaves"]:
            roles = [message["role"] for message in leaf["messages"]]
            assert roles == (["assistant", "user"] * len(roles))[: len(roles)]
            assert leaf["finish_reason"] != "error"
        foreign = [node for node in line["nodes"] if "sampled" in node]
        assert all(not any(node["sampled_logprobs"]) for node in foreign)
    metrics = [m for m in read_jsonl(first.folder / "metrics.jsonl") if "reward" in m]
    assert all(1 <= m["rollout/turns"] <= 3 for m in metrics)
    assert "rewards/Countdown/mean" in metrics[0]
    written = sum(m["rollout/tokens"] for m in metrics)
    assert written == sum(
        sum(node.get("sampled", [True] * len(node["token_ids"])))
        for line in lines[0]
        for node in line["nodes"]
    )


def ids(line):
    return [node["token_ids"] for node in line["nodes"]]


def test_tools_are_counted(folder, tmp_path):
    tools = {
        "task.environment": None,
        "task.tools": [f"{PLAYGROUND}:multiply"],
        "task.rewards": [f"{PLAYGROUND}:length"],
    }
    result = run(folder, tmp_path / "run", **tools)
    metrics = [m for m in read_jsonl(result.folder / "metrics.jsonl") if "reward" in m]
    for record in metrics:
        assert record["tools/call_frequency"] >= 0
        assert (record["tools/failure_frequency"] is None) == (record["tools/call_frequency"] == 0)


def test_reuse_and_environments_do_not_go_together(folder, tmp_path):
    with pytest.raises(ConfigError, match="cannot be restarted from its middle"):
        run(folder, tmp_path / "run", **{"rollout.reuse": 0.5})


def test_somebody_must_judge(folder, tmp_path):
    with pytest.raises(ConfigError, match="Name one with --reward"):
        run(folder, tmp_path / "a", **{"task.environment": None})
    with pytest.raises(ConfigError, match=r"has no get_reward\(\)"):
        run(folder, tmp_path / "b", **{"task.environment": f"{PLAYGROUND}:Silent"})


def test_a_run_with_a_tool_raises_its_reward(tmp_path):
    """The base calls the calculator in a quarter of its completions; what helps is calling it."""
    config = RunConfig.create(
        {
            "model.path": "turns-0.1m",
            "task.name": "calculator",
            "task.eval_prompts": 48,
            "rollout.prompts_per_step": 16,
            "rollout.group_size": 2,
            "rollout.max_turns": 2,
            "rollout.max_completion_tokens": 48,
            "learning.lr": 3e-3,
            "learning.warmup_steps": 0,
            "run.steps": 12,
            "run.out": str(tmp_path / "run"),
        }
    )
    result = train(config)
    assert result.base is not None
    assert result.adapter is not None
    assert result.base.pass_at_1 < 0.4
    assert result.adapter.pass_at_1 > 0.7
