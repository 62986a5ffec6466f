"""One run of tokens_to_learn.py: an arm on a task with a seed, trained and evaluated."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from learning_arms import ANSWERS, ARMS, BASE, SUBJECTS, Arm, Goal, Settings, Subject

from localrl.errors import LocalRLError
from localrl.runs.logs import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
COSTS = ("rollouts", "trained_tokens", "prefill_positions", "forward_calls", "wall_s")

Run = dict[str, Any]
"""A line of the results: the job's fields, `settings`, `where`, `evaluations`, and how it `ended`:
"learned", "budget", "time", or with the words of an error."""


@dataclass(frozen=True)
class Job:
    """One run to make. Its fields and settings say which runs are the same."""

    subject: str
    task: str
    arm: str
    lr: float
    seed: int
    budget: int
    every: int
    prompts: int

    @classmethod
    def of(cls, subject: Subject, task: str, arm: str, lr: float, seed: int) -> Job:
        """Return the run of the subject's sizes."""
        return cls(
            subject.name, task, arm, lr, seed, subject.budget, subject.every, subject.prompts
        )

    @property
    def goal(self) -> Goal:
        """The task, and when to end."""
        return SUBJECTS[self.subject].tasks[self.task]

    @property
    def made_by(self) -> Arm:
        """The arm itself."""
        return ARMS[self.arm]

    @property
    def settings(self) -> Settings:
        """All that the run sets; paths are relative to the repository."""
        return {
            **BASE,
            **SUBJECTS[self.subject].settings,
            **self.goal.settings,
            **self.made_by.settings,
            "task.eval_prompts": self.prompts,
            "learning.lr": self.lr,
            "run.seed": self.seed,
        }

    @property
    def record(self) -> Run:
        """The head of the run's line."""
        rules = {"stop": self.goal.stop, "rival": self.made_by.rival}
        return {**asdict(self), **rules, "settings": self.settings}


def identity(run: Run) -> str:
    """Return what tells a run from others: every field of its job, and all settings."""
    fields = (*Job.__dataclass_fields__, "stop", "rival", "settings")
    return json.dumps({name: run.get(name) for name in fields}, sort_keys=True)


def with_paths(settings: Settings) -> Settings:
    """Return the settings with the repository's data and reward files at their absolute paths."""
    task, rewards = settings["task.name"], settings.get("task.rewards", [])
    return settings | {
        "task.name": str(ROOT / task) if task.startswith("benchmarks/") else task,
        "task.rewards": [str(ROOT / each) if "/" in each else each for each in rewards],
    }


def with_answers(settings: Settings, place: Path) -> Settings:
    """Return the settings with a file, in the folder `place`, for `ANSWERS`.

    It has the training prompts of a built-in task, each with its answer as the reply.
    """
    from localrl.tasks.builtin import load_task

    if settings.get("task.demonstrations") != ANSWERS:
        return settings
    count, path = settings["task.train_prompts"], place / "answers.jsonl"
    task = load_task(settings["task.name"], train_prompts=count)
    with path.open("w", encoding="utf-8") as file:
        for example in map(task.train, range(count)):
            reply = {"role": "assistant", "content": str(example.answer)}
            file.write(json.dumps({"messages": [*example.messages, reply]}) + "\n")
    return settings | {"task.demonstrations": str(path)}


# Where and when


@dataclass(frozen=True)
class Where:
    """The circumstances of a run, by which its seconds may be compared with others."""

    machine: str
    started: float
    """Seconds since 1970."""
    load: float
    """Mean number of processes that wanted a core in the minute before."""
    waited: float | None = None
    """Seconds that its threads were ready and had no core, in all, as a share of the run's; None
    where the system does not say."""

    @classmethod
    def now(cls) -> Where:
        """Return the present circumstances."""
        return cls(machine(), time.time(), os.getloadavg()[0])

    def after(self, waited_s: float | None) -> Where:
        """Return the circumstances of the whole run, whose threads waited for this long."""
        if waited_s is None:
            return self
        return replace(self, waited=round(waited_s / (time.time() - self.started), 4))


def machine() -> str:
    """Return the processor's name, the number of cores, and the system."""
    names: list[str] = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model n")]
    name = next(iter(names), platform.processor() or platform.machine())
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def waited_s() -> float | None:
    """Return the seconds that threads of this process were ready and had no core; None if unknown.

    A load says how many wanted a core before the run. This says whether it got what it wanted,
    also on a machine where others work at a lower priority.
    """
    told = list(Path("/proc/self/task").glob("*/schedstat"))
    return sum(int(path.read_text().split()[1]) for path in told) / 1e9 if told else None


class Clock:
    """Wall and processor seconds of this process, in training steps alone."""

    wall_s = cpu_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall_s += time.perf_counter() - wall
        self.cpu_s += time.process_time() - cpu


# The run


def make(job: Job, *, python: str | None = None) -> Run:
    """Train and evaluate. python: the interpreter of TRL's environment, for arms outside.

    Raises: LocalRLError for an arm outside without one; what training raises, but for divergence.
    """
    where = Where.now()
    if job.made_by.outside:
        from outsider import learn_outside

        if python is None:
            raise LocalRLError(f"{job.arm} needs --python, the interpreter of its environment.")
        evaluations, ended = learn_outside(job, python)
    else:
        before = waited_s()
        with TemporaryDirectory() as place:
            folder = Path(place) / "run"
            evaluations, ended = learn(job, folder)
            add_costs(evaluations, folder)
        where = where.after(None if before is None else (waited_s() or 0.0) - before)
    return {**job.record, "where": asdict(where), "ended": ended, "evaluations": evaluations}


def learn(job: Job, folder: Path) -> tuple[list[Run], str]:
    """Return the evaluations of one run, and why it ended."""
    from rivals import discarded
    from stages import with_stages

    from localrl.config import RunConfig
    from localrl.processes.heartbeat import Heartbeat
    from localrl.train import train_step
    from localrl.training.session import NullProgress
    from localrl.training.setup import open_session

    given = with_paths(with_answers(job.settings, folder.parent))
    settings = {"run.out": str(folder), "run.rollout_log_limit": 10**12, **given}
    config, clock, step = RunConfig.create(settings), Clock(), 0
    opened = open_session(
        config, overwrite=False, resume=False, progress=NullProgress(), heartbeat=Heartbeat()
    )
    with opened as session:
        session = with_stages(session, job.made_by.rival)

        def tokens() -> int:
            return session.tokens + discarded(session).tokens

        def evaluate() -> Run:
            found = session.evaluate(step)
            assert found is not None, "every arm has held-out prompts"
            return {
                "step": step,
                "tokens": tokens(),
                "wall_s": clock.wall_s,
                "cpu_s": clock.cpu_s,
                "pass@1": found.pass_at_1,
                "mean_reward": found.mean_reward,
                "mean_completion_tokens": found.mean_completion_tokens,
                "discarded": discarded(session).completions,
            }

        evaluations = [evaluate()]
        while tokens() < job.budget:
            step += 1
            try:
                with clock.running():
                    train_step(session, step)
            except LocalRLError as error:
                if error.exit_code != LocalRLError.exit_code:
                    raise  # only a diverged adapter is a result
                return evaluations, str(error)
            if due(evaluations[-1]["tokens"], tokens(), job.every) or tokens() >= job.budget:
                evaluations.append(evaluate())
                if learned(evaluations, job.goal):
                    return evaluations, "learned"
    return evaluations, "budget"


def due(last: int, now: int, every: int) -> bool:
    """Return True if a multiple of `every` tokens was passed since the last evaluation."""
    return now // every > last // every


def learned(evaluations: Sequence[Run], goal: Goal) -> bool:
    """Return True if the last two evaluations are above the mark."""
    last = [each[goal.measure] or 0 for each in evaluations[-2:]]
    return len(last) > 1 and min(last) > goal.stop


def add_costs(evaluations: Sequence[Run], folder: Path) -> None:
    """Give each evaluation what had been spent by then; null where the metrics do not say it.

    A completion that is replayed is scored once, in the step that sampled it. `rollouts` includes
    what a rival sampled and discarded.
    """
    spent: dict[str, dict[int, float]] = defaultdict(dict)
    for line in read_jsonl(folder / "metrics.jsonl"):
        for name in ("update/trained_tokens", "rollout/prefill_positions", "rollout/forward_calls"):
            if line.get(name) is not None:
                spent[name.partition("/")[2]][line["step"]] = line[name]
    for line in read_jsonl(folder / "rollouts.jsonl"):
        steps = spent["rollouts"]
        steps[line["step"]] = steps.get(line["step"], 0) + len(line["leaves"])
    for each in evaluations:
        for name in COSTS[:-1]:
            counts = [n for step, n in spent[name].items() if step <= each["step"]]
            each[name] = sum(counts) if spent[name] else None
        if each["rollouts"] is not None:
            each["rollouts"] += each.pop("discarded", 0)
