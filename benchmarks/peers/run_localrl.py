"""localrl on the job of all runners."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import SCALE, Job, Reached, Record, read_job, versions

HERE = Path(__file__).resolve()


class Marks:
    """Writes down when a step ends, and what it has cost."""

    def __init__(self, record: Record, job: Job) -> None:
        self.record, self.job = record, job

    def begin(self, session: Any) -> None:
        """The run is open."""
        self.record.start(self.job)

    def start(self, heartbeat: Any) -> None:
        """Nothing is shown."""

    def evaluating(self, step: int) -> None:
        """Nothing is evaluated."""

    def evaluated(self, step: int, evaluation: Any) -> None:
        """Nothing is evaluated."""

    def end(self) -> None:
        """Nothing was shown."""

    def warn(self, line: str) -> None:
        """Show it."""
        print(line)

    def stepped(self, metrics: Mapping[str, Any]) -> None:
        """A step has ended."""
        names = ("forward_calls", "prefill_positions", "decode_positions")
        counts = {name: metrics[f"rollout/{name}"] for name in names}
        counts["trained_tokens"] = metrics["update/trained_tokens"]
        self.record.step(counts)
        self.record.tokens.append(metrics["rollout/tokens"])
        self.record.rewards += [metrics["reward"]] * metrics["rollout/completions"]
        if self.record.check(self.job):
            raise Reached


def settings(job: Job) -> dict[str, Any]:
    """Those that the job names; with a target, the demonstration's own for all others."""
    chosen = {
        "task.eval_prompts": 0,
        "learning.lr": job.rate,
        "run.steps": job.steps,
        "run.seed": job.seed,
    }
    if job.target:
        return chosen
    return {
        **chosen,
        "model.path": job.model,
        "task.name": job.data,
        "task.rewards": f"{HERE.with_name('even_reward.py')}:{job.reward}_reward",
        "rollout.prompts_per_step": job.prompts,
        "rollout.group_size": job.group,
        "rollout.max_prompt_tokens": job.max_length - job.tokens,
        "rollout.max_completion_tokens": job.tokens,
        "lora.rank": job.rank,
        "lora.scale": SCALE,
    }


def main() -> None:
    """Train; print nothing but warnings."""
    job = read_job()
    from localrl import RunConfig, train

    record = Record(versions("localrl", "mlx", "mlx-lm", "numpy"))
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.create({**settings(job), "run.out": f"{folder}/run"})
        with contextlib.suppress(Reached):
            train(config, progress=Marks(record, job))
    record.write(job)


if __name__ == "__main__":
    main()
