"""Rewards for programs: the completion is run against tests, in a sandbox or not at all.

They run in the reward process and import only the standard library. The column `tests` holds, for
each example, assert statements as text or as a list of texts, or a list of
`{"input": ..., "output": ...}` for programs that read stdin and write stdout; with None or an
empty list the reward is None.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.errors import ConfigError
from localrl.rewards.answers import Completion, text_of
from localrl.rewards.code_tests import split
from localrl.rewards.sandbox import Sandbox, find_sandbox, unsafe_sandbox
from localrl.rewards.sandbox_process import Process, SandboxLimits

UNSAFE_VARIABLE = "LOCALRL_UNSAFE_CODE"
PEER = Path(__file__).with_name("code_peer.py")
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
PYTHON_NAMES = ("python", "python3", "py")
Tests = str | Sequence[str] | Sequence[Mapping[str, str]] | None


@dataclass(frozen=True)
class CodeLimits:
    """Limits for one program with all of its tests, and for one call with all of its programs."""

    program_s: float = 5.0
    total_s: float = 25.0
    """Seconds per call, below `task.reward_timeout_s`; programs that no longer fit are not run."""
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    at_once: int = 0
    """Number of programs run concurrently; 0 for one per core."""


def code_reward(
    completions: Sequence[Completion], tests: Sequence[Tests], **columns: Any
) -> list[float | None]:
    """The share of its tests that each program passes."""
    return score_programs(completions, tests)


def code_reward_all(
    completions: Sequence[Completion], tests: Sequence[Tests], **columns: Any
) -> list[float | None]:
    """1.0 for a program that passes all of its tests, else 0.0."""
    return score_programs(completions, tests, all_or_nothing=True)


def score_programs(
    completions: Sequence[Completion],
    tests: Sequence[Tests],
    *,
    all_or_nothing: bool = False,
    limits: CodeLimits | None = None,
    sandbox: Sandbox | None = None,
) -> list[float | None]:
    """Score each completion's program from 0 to 1; None without tests.

    A program for which no time was left gets NaN, which counts as a failed reward, never as 0.

    Raises:
        ConfigError: no sandbox works, and running without one was not requested.
        SandboxError: the sandbox did not start this time.
        ValueError: an example's tests cannot be read.
    """
    limits = limits or CodeLimits()
    cases = [read_tests(value) for value in tests]
    if not any(cases):
        return [None] * len(cases)
    sandbox = sandbox or choose_sandbox()
    deadline = time.monotonic() + limits.total_s

    def score(completion: Completion, case: Case | None) -> float | None:
        if case is None:
            return None
        if deadline - time.monotonic() < limits.program_s:
            return math.nan
        passed = case.passed(program_of(text_of(completion)), sandbox, limits)
        return float(passed == case.count) if all_or_nothing else passed / case.count

    with ThreadPoolExecutor(limits.at_once or _cores()) as pool:
        scores = list(pool.map(score, completions, cases))
    late = sum(score is not None and math.isnan(score) for score in scores)
    if late:
        print(
            f"{late} of {len(scores)} programs were not run: {limits.total_s:g} s was not enough. "
            "Raise total_s of CodeLimits together with task.reward_timeout_s, or lower program_s.",
            file=sys.stderr,
        )
    return scores


def check_code_rewards() -> str:
    """Return one line on where the model's programs will run; call it before a run begins.

    Raises:
        ConfigError: no sandbox works, and running without one was not requested.
    """
    sandbox = choose_sandbox()
    if not sandbox.safe:
        return (
            "UNSAFE: programs written by the model run with your permissions, without a sandbox: "
            "they can read and delete your files and use the network"
        )
    return (
        f"programs run in {sandbox.name}: a test program could not read or write your files, "
        "reach the network, start processes without limit or leave one behind"
    )


def allow_unsafe_code(allow: bool) -> None:
    """Allow or forbid running without a sandbox if none works, in child processes too.

    Call it in either case before the reward process starts, so that a variable left over in the
    environment has no effect.
    """
    if allow:
        os.environ[UNSAFE_VARIABLE] = "1"
    else:
        os.environ.pop(UNSAFE_VARIABLE, None)


def choose_sandbox() -> Sandbox:
    """A sandbox that has proved itself; the unsafe one only if none does and it was requested."""
    return _choose(os.environ.get(UNSAFE_VARIABLE) == "1")


@functools.cache
def _choose(unsafe: bool) -> Sandbox:
    try:
        return find_sandbox()
    except ConfigError as error:
        if unsafe:
            return unsafe_sandbox()
        raise ConfigError(
            f"{error} Or pass --unsafe-code to run them with your own permissions, without any "
            "protection."
        ) from None


def program_of(text: str) -> str:
    """The last block fenced as Python, else the last unnamed fenced block, else the whole text."""
    blocks = FENCE.findall(text)
    python = [body for name, body in blocks if name.lower() in PYTHON_NAMES]
    plain = [body for name, body in blocks if not name]
    return (python or plain or [text])[-1]


@dataclass(frozen=True)
class Asserts:
    """Tests as statements: pairs (source, True if it counts as a test)."""

    statements: tuple[tuple[str, bool], ...]

    @property
    def count(self) -> int:
        return sum(counted for _, counted in self.statements)

    def passed(self, program: str, sandbox: Sandbox, limits: CodeLimits) -> int:
        """Number of tests passed; tests and program run in separate processes."""
        bounds = _bounds(limits, limits.program_s)
        to_program, to_tests = os.pipe(), os.pipe()
        ends = [*to_program, *to_tests]
        ask_program = {"source": program, "read": to_program[0], "write": to_tests[1]}
        ask_tests = {"tests": self.statements, "read": to_tests[0], "write": to_program[1]}
        peer = PEER.read_text()
        try:
            with (
                sandbox.start(
                    peer, bounds, stdin=json.dumps(ask_program), pass_fds=[ends[0], ends[3]]
                ) as solution,
                sandbox.start(
                    peer, bounds, stdin=json.dumps(ask_tests), pass_fds=[ends[2], ends[1]]
                ) as judge,
            ):
                while ends:
                    os.close(ends.pop())
                return _wait_for_both(solution, judge).count("1")
        finally:
            for end in ends:
                os.close(end)


def _wait_for_both(solution: Process, judge: Process) -> str:
    """Output of the tests' process; the program's process is watched until then and then killed."""
    problems: list[BaseException] = []

    def watch() -> None:
        try:
            solution.wait()
        except BaseException as error:
            problems.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        outcome = judge.wait()
    finally:
        solution.kill()
        watcher.join()
    if problems:
        raise problems[0]
    return outcome.stdout


@dataclass(frozen=True)
class Pairs:
    """Tests as (input, output) pairs of whole program runs."""

    pairs: tuple[tuple[str, str], ...]

    @property
    def count(self) -> int:
        return len(self.pairs)

    def passed(self, program: str, sandbox: Sandbox, limits: CodeLimits) -> int:
        """Number of tests passed, one run each; outputs are compared here, outside the sandbox."""
        deadline = time.monotonic() + limits.program_s
        passed = 0
        for given, expected in self.pairs:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            with sandbox.start(program, _bounds(limits, left), stdin=given) as process:
                outcome = process.wait()
            passed += outcome.status == "ok" and _lines(outcome.stdout) == _lines(expected)
        return passed


Case = Asserts | Pairs


def read_tests(value: Tests) -> Case | None:
    """Parse the tests of one example; None if it has none.

    Raises:
        ValueError: they are neither statements nor input-output pairs.
    """
    if value is None:
        return None
    if isinstance(value, str):
        found = Asserts(tuple(split(value)))
    elif all(isinstance(item, str) for item in value):
        found = Asserts(tuple(_together(split(str(item))) for item in value))
    elif all(isinstance(item, Mapping) and {"input", "output"} <= {*item} for item in value):
        pairs = [item for item in value if isinstance(item, Mapping)]
        found = Pairs(tuple((str(pair["input"]), str(pair["output"])) for pair in pairs))
    else:
        raise ValueError(
            f"tests are {str(value)[:80]!r}; give assert statements as text or as a list of texts, "
            'or a list of {"input": ..., "output": ...}'
        )
    return found if found.count else None


def _together(statements: list[tuple[str, bool]]) -> tuple[str, bool]:
    return "\n".join(text for text, _ in statements), any(counted for _, counted in statements)


def _bounds(limits: CodeLimits, time_s: float) -> SandboxLimits:
    return SandboxLimits(time_s, limits.memory_bytes, limits.output_bytes)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
