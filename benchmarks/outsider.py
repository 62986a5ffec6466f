"""TRL's GRPOTrainer as an arm of tokens_to_learn.py: the same prompts, rewards and adapters.

It trains a copy of the weights in float32, since its CPU path has no products with 4 bits, and runs
in the environment that .ci/interop makes. Its process is benchmarks/peers/learn_trl.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from learning_runs import ROOT, Job, Run, with_paths

from localrl.config import RunConfig
from localrl.errors import LocalRLError
from localrl.policy.loading import find_model
from localrl.processes.worker import Worker
from localrl.records import Example
from localrl.rewards.catalog import parse_rewards
from localrl.tasks.loading import open_task

RUNNER = ROOT / "benchmarks" / "peers" / "learn_trl.py"
LIMIT_S = 1200.0
"""Seconds of training after which a run ends: a step takes TRL several times as long."""
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**35)}
"""Settings of glibc with which freed arrays are kept for the next ones: a sixth faster for TRL."""
PROCESS_S = 3 * LIMIT_S
"""Most seconds of the whole process, evaluations included."""


def learn_outside(job: Job, python: str) -> tuple[list[Run], str]:
    """Return the evaluations of TRL's run, and why it ended.

    Raises: LocalRLError if its process failed.
    """
    with TemporaryDirectory() as place:
        folder = Path(place)
        make_dense(job, folder / "model")
        (folder / "job.json").write_text(json.dumps(described(job)))
        command = [python, str(RUNNER), str(folder)]
        try:
            env = {**os.environ, **KEEP}
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PROCESS_S, env=env
            )
        except subprocess.TimeoutExpired:
            raise LocalRLError(f"TRL was not done after {PROCESS_S:.0f} seconds.") from None
        if done.returncode or not (folder / "result.json").exists():
            lines = done.stderr.strip().splitlines() or ["it wrote no result"]
            raise LocalRLError(f"TRL ended with code {done.returncode}: {lines[-1]}")
        told = json.loads((folder / "result.json").read_text())
    return told["evaluations"], told["ended"]


def described(job: Job) -> dict[str, Any]:
    """Return all that TRL's process needs besides the model."""
    config = RunConfig.create(with_paths(job.settings))
    rewards = parse_rewards(config.task.rewards, config.task.reward_weights or None)
    with Worker(time_limit_s=60.0, memory_limit_bytes=2**31) as worker:
        task = open_task(config.task, rewards, worker)
        train = [task.train(n) for n in range(task.train_size)]
        held_out = task.evaluation(job.prompts)
        targets = [(spec.target, spec.weight) for spec in task.rewards]
    return {
        "repository": str(ROOT),
        "train": rows(train),
        "held_out": rows(held_out),
        "rewards": targets,
        "prompts": config.rollout.prompts_per_step,
        "group": config.rollout.group_size,
        "tokens": config.rollout.max_completion_tokens,
        "temperature": config.rollout.temperature,
        "rank": config.lora.rank,
        "scale": config.lora.scale,
        "lr": job.lr,
        "warmup": config.learning.warmup_steps,
        "seed": job.seed,
        "budget": job.budget,
        "every": job.every,
        "stop": job.goal.stop,
        "limit_s": LIMIT_S,
        "threads": config.memory.threads,
    }


def rows(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return the examples as TRL's data; answers and columns as JSON, since types may differ."""
    return [
        {
            "prompt": [dict(message) for message in example.messages],
            "answer": json.dumps(example.answer),
            "columns": json.dumps(dict(example.columns)),
        }
        for example in examples
    ]


def make_dense(job: Job, out: Path) -> None:
    """Write the model's weights in float32, as transformers reads them."""
    from mlx_lm import convert

    convert(str(find_model(job.settings["model.path"])), str(out), dequantize=True, dtype="float32")
    (out / "README.md").unlink(missing_ok=True)
    shutil.rmtree(out / ".cache", ignore_errors=True)
