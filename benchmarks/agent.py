"""An agent that calls the model by OpenAI's API, beside an environment that does the same.

    python benchmarks/agent.py speed
    python benchmarks/agent.py learn

`speed` samples the same completions in turns from each, and writes tokens per second: those that
the model wrote, by the time until all completions are done. `learn` trains from three seeds with
each. Both play the task `guessing` on the embedded model that talks in turns, or `speed` on another
(--model). The agent `plain` is examples/agent, `openai` does the same with the openai package, if
that is installed. Results are added to benchmarks/agent.json.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from localrl.agents.agents import open_agents
from localrl.agents.conversations import AgentLimits
from localrl.config import RunConfig
from localrl.engines.open import make_policy
from localrl.policy.loading import find_model
from localrl.policy.model import load_model
from localrl.processes.worker import Worker
from localrl.records import Group
from localrl.rollouts.agents import AgentTurns
from localrl.rollouts.decode import Decoder
from localrl.rollouts.groups import Shape, sample_groups
from localrl.rollouts.turns import Turns
from localrl.runs.logs import read_jsonl
from localrl.tasks.builtin import load_task
from localrl.tasks.environments import open_environments
from localrl.train import train

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_name("agent.json")
MODEL = "turns-0.1m"
TASK = "guessing"
AGENTS = {
    "plain": f"{ROOT / 'examples' / 'agent' / 'guess.py'}:play",
    "openai": f"{ROOT / 'tests' / 'interop' / 'openai_agent.py'}:guess",
}
SEEDS = (0, 1, 2)
TURNS, TOKENS = 4, 64
PROMPTS, COMPLETIONS = 16, 8

Sample = Callable[[int], list[Group]]


def arms() -> list[str]:
    """The environment, and the agents whose client is installed."""
    missing = importlib.util.find_spec("openai") is None
    return ["environment", *(name for name in AGENTS if not (missing and name == "openai"))]


@contextmanager
def samplers(model: str, prompts: int) -> Iterator[dict[str, Sample]]:
    """Functions that sample the completions of one step, by arm."""
    loaded = load_model(find_model(model))
    policy = make_policy(loaded, rank=8, scale=2.0, seed=0, for_cpu=True, dense=True)
    task = load_task(TASK, train_prompts=0)
    decoder = Decoder(policy, temperature=1.0, rows=prompts * COMPLETIONS)

    def sampler(turns: Turns | AgentTurns, encode: Callable[[Any], Any]) -> Sample:
        def sample(step: int) -> list[Group]:
            examples = [task.train(step * prompts + n) for n in range(prompts)]
            return sample_groups(
                decoder,
                examples,
                encode(examples),
                Shape(COMPLETIONS, COMPLETIONS),
                rule=None,
                max_completion_tokens=TOKENS,
                seed=0,
                step=step,
                version=0,
                turns=turns,
            )

        return sample

    with ExitStack() as stack:
        worker = stack.enter_context(Worker(time_limit_s=600.0, memory_limit_bytes=None))
        environments = open_environments(task.environment, (), worker, limit_s=60.0, warn=print)
        assert environments is not None
        environments.connect(policy.tokenizer)
        found = {"environment": sampler(Turns(environments.answer, TURNS), environments.prompts)}
        for name in arms()[1:]:
            own = stack.enter_context(Worker(time_limit_s=600.0, memory_limit_bytes=None))
            limits = AgentLimits(TURNS, 512, 600.0)
            agents = open_agents(AGENTS[name], own, limits, warn=print, beat=lambda work: None)
            agents.connect(policy.tokenizer)
            stack.callback(agents.close)
            found[name] = sampler(AgentTurns(agents.begin, agents.answer), lambda examples: ())
        yield found


def measure_speed(model: str, prompts: int, repeats: int) -> dict[str, Any]:
    """Return the tokens per second of each arm, and the median of their ratios in each repeat."""
    rates: dict[str, list[float]] = {}
    with samplers(model, prompts) as found:
        for step in range(repeats + 1):
            tokens: dict[str, int] = {}
            for name, sample in found.items():
                started = time.perf_counter()
                groups = sample(step)
                seconds = time.perf_counter() - started
                written = sum(int(node.sampled.sum()) for g in groups for node in g.nodes)
                tokens[name] = written
                if step:  # the first one loads modules
                    rates.setdefault(name, []).append(written / seconds)
            assert len(set(tokens.values())) == 1, f"the arms drew different completions: {tokens}"
    base = rates["environment"]
    return {
        "prompts": prompts,
        "completions": COMPLETIONS,
        "repeats": repeats,
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": {
            name: statistics.median(a / b for a, b in zip(values, base, strict=True))
            for name, values in rates.items()
            if name != "environment"
        },
    }


def train_arm(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train with one arm from one seed, and return its evaluations and sampling speed."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            RunConfig.create(
                {
                    "model.path": MODEL,
                    "task.name": TASK,
                    "task.agent": AGENTS.get(name),
                    "rollout.prompts_per_step": PROMPTS,
                    "rollout.group_size": COMPLETIONS,
                    "rollout.max_turns": TURNS,
                    "rollout.max_completion_tokens": TOKENS,
                    "learning.lr": 2e-3,
                    "learning.warmup_steps": 2,
                    "memory.threads": 1,
                    "run.steps": steps,
                    "run.seed": seed,
                    "run.out": f"{folder}/run",
                }
            )
        )
        lines = [line for line in read_jsonl(result.folder / "metrics.jsonl") if "reward" in line]
        scores = json.loads((result.folder / "eval.json").read_text())
    sampling = sum(line["time/rollout_s"] - line["time/reward_s"] for line in lines)
    return {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "before": scores["base"]["pass@1"],
        "after": scores["adapter"]["pass@1"],
        "ci95": scores["adapter"]["ci95"],
        "rewards": [line["reward"] for line in lines],
        "sequences": max(line["rollout/sequences"] for line in lines),
        "tokens_per_s": sum(line["rollout/tokens"] for line in lines) / sampling,
    }


def add(key: str, value: Any) -> None:
    """Add a result to the file."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, key: value}, indent=1) + "\n")


@click.group()
def main() -> None:
    """Compare agents with an environment."""


@main.command()
@click.option("--model", default=MODEL)
@click.option("--prompts", default=PROMPTS)
@click.option("--repeats", default=10)
def speed(model: str, prompts: int, repeats: int) -> None:
    """Measure sampling."""
    found = measure_speed(model, prompts, repeats)
    add(f"speed {Path(model).name}", found)
    click.echo(json.dumps(found, indent=1))


@main.command()
@click.option("--steps", default=30)
def learn(steps: int) -> None:
    """Train from three seeds with each arm."""
    results = []
    for seed in SEEDS:
        for name in arms():
            results.append(train_arm(name, seed, steps))
            add("learn", results)
            shown = {k: v for k, v in results[-1].items() if k != "rewards"}
            click.echo(json.dumps(shown))


if __name__ == "__main__":
    main()
