"""Generated tokens and seconds until a task is learned: localrl's strategies and their rivals.

    localrl pull smollm2-135m
    python benchmarks/tokens_to_learn.py all                    # both models, then the page
    python benchmarks/tokens_to_learn.py run --subject smollm2 --arms "flat-8,pairs,2-GRPO"
    python benchmarks/tokens_to_learn.py status
    python benchmarks/tokens_to_learn.py page

Each arm, learning rate, seed and task is one run in a process of its own, evaluated on the same
held-out prompts; its line is appended to benchmarks/tokens_to_learn/ when it ends, and a run that
is there with the settings its arm has now is not made again. So the command may be stopped at any
time and given again. The embedded model screens all strategies (5 to 10 seconds a run); the
pretrained one takes 3 to 6 minutes a run in one thread, two at a time. Tokens that a strategy
samples and throws away count; those of evaluations do not.

Seconds are compared only between runs on one machine whose starts are less than an hour apart and
which had the cores that they wanted. All arms of a seed therefore run in turn, and flat-8 again
where they are resumed later. A machine that does not become quiet ends the command, or with
--busy mark is only noted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import click
from learning_arms import ARMS, SUBJECTS, Subject, base_of
from learning_results import (
    HOUR_S,
    MOST_LOAD,
    PLACE,
    Known,
    missing,
    rate,
    read,
    results,
    timed,
    tuning,
)
from learning_runs import ROOT, Job, identity, machine, make

from localrl.runs.logs import JsonLines

SEEDS = (0, 1, 2, 3, 4)
QUIET_S = {"refuse": 240.0, "mark": 0.0}
"""The longest wait for the load to fall, which it does slowly after the run before, by --busy."""
POLL_S = 5.0
ROOM_S = 600.0
"""A run of the base this much less than an hour old is still a partner for the next one."""


# Scheduling


def turns(subject: Subject, arms: Sequence[str], seeds: Sequence[int], known: Known) -> list[Job]:
    """Return the runs of all tasks and seeds, the arms of each seed in turn.

    Raises: ClickException for an arm whose learning rate is not known.
    """
    rates = {arm: rate(subject, arm, known) for arm in arms}
    untuned = [arm for arm, lr in rates.items() if lr is None]
    if untuned:
        raise click.ClickException(f"No learning rate is known for {untuned}: add --tune.")
    return [
        Job.of(subject, task, arm, lr, seed)
        for task in subject.tasks
        for seed in seeds
        for arm, lr in rates.items()
        if lr is not None
    ]


def planned(jobs: Sequence[Job], known: Callable[[], Known], base: str = "") -> Iterator[Job]:
    """Yield the missing jobs; before one whose base was not run within the hour, the base again.

    base: the arm that seconds are paired with; empty: none. `known` is asked anew for each job,
    since they come while others are being done.
    """
    bases = {(job.task, job.seed): job for job in jobs if job.arm == base}
    begun: set[Job] = set()
    for job in jobs:
        runs = known()
        if identity(job.record) in runs:
            continue
        partner = bases.get((job.task, job.seed), job)
        if partner not in (job, *begun) and not _fresh(partner, runs):
            begun.add(partner)
            yield partner
        begun.add(job)
        yield job


def _fresh(job: Job, known: Known) -> bool:
    """Return True if a quiet run of this job on this machine can still be paired with one now."""
    return any(
        time.time() - run["where"]["started"] < HOUR_S - ROOM_S
        and run["where"]["machine"] == machine()
        and timed(run, SUBJECTS[job.subject])
        for run in known.get(identity(job.record), ())
    )


def await_quiet(busy: str, at_once: int) -> None:
    """Wait until the load allows the next run to be timed.

    Raises: ClickException if it does not fall and `busy` is "refuse".
    """
    most, began = MOST_LOAD + at_once - 1, time.monotonic()
    while (load := os.getloadavg()[0]) > most:
        if time.monotonic() - began >= QUIET_S[busy]:
            if busy == "mark":
                click.echo(f"load {load:.1f}: seconds of the next run will not be compared")
                return
            raise click.ClickException(
                f"The load has been above {most:g} for {QUIET_S[busy]:.0f} s (now {load:.1f}), so"
                " seconds would mean nothing. Give the command again when the machine is quiet,"
                " or with --busy mark, which compares tokens only."
            )
        time.sleep(POLL_S)


def schedule(bench: Bench, jobs: Sequence[Job], base: str = "") -> None:
    """Make the missing runs, each in a process of its own, as many at once as the subject says.

    base: see `planned`.

    Raises: ClickException if the machine stays busy, or, after all others are made, if one failed.
    """
    todo, lock, failed = planned(jobs, bench.known, base), Lock(), []
    click.echo(f"{len(jobs) - len(missing(jobs, bench.known()))} of {len(jobs)} runs are there.")

    def work(number: int) -> None:
        while True:
            with lock:
                job = next(todo, None)
                if job is None:
                    return
                if bench.subject.seconds != "cpu_s":  # a processor's seconds always count
                    await_quiet(bench.busy, bench.subject.at_once)
            if not start(bench, job):
                failed.append(job)

    with ThreadPoolExecutor(bench.subject.at_once) as pool:
        list(pool.map(work, range(bench.subject.at_once)))
    if failed:
        raise click.ClickException(f"{len(failed)} runs failed.")


def start(bench: Bench, job: Job) -> bool:
    """Make one run with `one`, in a process; return True if that worked."""
    sizes = {"tokens": job.budget, "every": job.every, "prompts": job.prompts}
    run = {"subject": job.subject, "task": job.task, "arm": job.arm, "lr": job.lr, "seed": job.seed}
    places = {"out": bench.out, "python": bench.python} if bench.python else {"out": bench.out}
    command = [sys.executable, __file__, *_flags({**sizes, **places}), "one", *_flags(run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    click.echo(f"{job.task}, {job.arm}, {job.lr:g}, seed {job.seed}: {lines[-1] if lines else '?'}")
    return done.returncode == 0


def _flags(given: dict[str, Any]) -> list[str]:
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


# Commands


@dataclass(frozen=True)
class Bench:
    """A subject with the sizes of this call, and where its results are."""

    subject: Subject
    out: Path
    busy: str
    python: str | None

    @property
    def file(self) -> Path:
        """The subject's results."""
        return results(self.subject, self.out)

    def known(self) -> Known:
        """Return the runs there are."""
        return read(self.file)


@dataclass(frozen=True)
class Options:
    """What is said before the command."""

    out: Path
    busy: str
    python: str | None
    tokens: int | None
    every: int | None
    prompts: int | None

    def bench(self, name: str) -> Bench:
        """Return the bench of a subject."""
        sizes = {"budget": self.tokens, "every": self.every, "prompts": self.prompts}
        given = {key: value for key, value in sizes.items() if value is not None}
        return Bench(replace(SUBJECTS[name], **given), self.out, self.busy, self.python)


@click.group(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=PLACE, help="Of the results.")
@click.option("--busy", type=click.Choice(list(QUIET_S)), default="refuse")
@click.option("--python", help="Interpreter of an environment with TRL, for the arm of that name.")
@click.option("--tokens", type=int, help="Another budget than the subject's.")
@click.option("--every", type=int, help="Generated tokens between evaluations.")
@click.option("--prompts", type=int, help="Held-out prompts of an evaluation.")
@click.pass_context
def main(context: click.Context, **given: Any) -> None:
    """Keep the options for the command."""
    context.obj = Options(**given)


SUBJECT = click.option("--subject", type=click.Choice(list(SUBJECTS)), required=True)


@main.command(help="One run, in this process.")
@SUBJECT
@click.option("--task", required=True)
@click.option("--arm", type=click.Choice(list(ARMS)), required=True)
@click.option("--lr", type=float, required=True)
@click.option("--seed", type=int, required=True)
@click.pass_obj
def one(options: Options, subject: str, task: str, arm: str, lr: float, seed: int) -> None:
    """Make a run and append its line."""
    bench = options.bench(subject)
    if task not in bench.subject.tasks:
        raise click.ClickException(f"{subject} has the tasks {', '.join(bench.subject.tasks)}.")
    run = make(Job.of(bench.subject, task, arm, lr, seed), python=options.python)
    bench.out.mkdir(parents=True, exist_ok=True)
    with closing(JsonLines(bench.file)) as lines:
        lines.append(run)
    last = run["evaluations"][-1]
    spent = f"{last['tokens']} tokens, {last['wall_s']:.0f} s"
    measure = bench.subject.tasks[task].measure
    click.echo(f"{measure} {last[measure]:.3f}, {spent}, {run['ended']}")


def _arms(subject: Subject, arms: str, python: str | None) -> list[str]:
    """Return the names of the arms to run.

    Raises: ClickException for an unknown or removed one, or one that lacks its environment.
    """
    names = [name.strip() for name in arms.split(",")] if arms else list(subject.arms)
    if unknown := [name for name in names if name not in ARMS]:
        raise click.ClickException(f"There is no arm {unknown[0]!r}; there are {', '.join(ARMS)}.")
    if gone := [name for name in names if ARMS[name].removed]:
        raise click.ClickException(f"{gone[0]} was removed from localrl: only its results remain.")
    if not python and any(ARMS[name].outside for name in names):
        raise click.ClickException("TRL runs in an environment of its own: add --python.")
    return names


@main.command("run", help="Make the runs that are missing.")
@SUBJECT
@click.option("--arms", default="", help="Comma-separated; the subject's own unless given.")
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True)
@click.option("--tasks", default="", help="Comma-separated; all unless given.")
@click.option("--tune", is_flag=True, help="Make the runs that decide learning rates first.")
@click.pass_obj
def run_missing(
    options: Options, subject: str, arms: str, seeds: str, tasks: str, tune: bool
) -> None:
    """Tune, if wanted; then take the arms in turn, seed by seed."""
    bench = options.bench(subject)
    names = _arms(bench.subject, arms, options.python)
    if tune:
        schedule(bench, [job for arm in names for job in tuning(bench.subject, arm)])
    jobs = turns(bench.subject, names, [int(seed) for seed in seeds.split(",")], bench.known())
    wanted = tasks.split(",") if tasks else list(bench.subject.tasks)
    schedule(bench, [job for job in jobs if job.task in wanted], base_of(names))


@main.command(help="The runs that there are, and those that are missing.")
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True)
@click.pass_obj
def status(options: Options, seeds: str) -> None:
    """Count runs by subject, task and arm."""
    for name in SUBJECTS:
        bench = options.bench(name)
        known = bench.known()
        for arm in bench.subject.arms:
            lr = rate(bench.subject, arm, known)
            if lr is None:
                left = len(missing(tuning(bench.subject, arm), known))
                click.echo(f"{name:9} {arm:28} {left} runs until its learning rate is known")
                continue
            numbers = [int(seed) for seed in seeds.split(",")]
            for task in bench.subject.tasks:
                jobs = [Job.of(bench.subject, task, arm, lr, seed) for seed in numbers]
                there = len(jobs) - len(missing(jobs, known))
                click.echo(f"{name:9} {arm:28} {task:12} {there} of {len(jobs)} at lr {lr:g}")


@main.command("page", help="Write docs/strategies.md and its tables and picture.")
@click.pass_obj
def write_page(options: Options) -> None:
    """Write what the results say."""
    from tokens_to_learn_page import write

    write({name: options.bench(name).known() for name in SUBJECTS})


@main.command("all", help="Tune and run both subjects, and write the page.")
@click.pass_context
def everything(context: click.Context) -> None:
    """All of it."""
    for name in SUBJECTS:
        given = {"arms": "", "seeds": ",".join(map(str, SEEDS)), "tasks": "", "tune": True}
        context.invoke(run_missing, subject=name, **given)
    context.invoke(write_page)


if __name__ == "__main__":
    main()
