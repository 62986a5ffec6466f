"""Whole runs under limits, in need and after refusals: what they take, and that nothing is lost."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import tiny
from steps import relative_difference

from localrl.backend import mx
from localrl.config import RunConfig, keys
from localrl.display.console import memory
from localrl.errors import ConfigError, MemoryBudgetError
from localrl.learning.gradient import GradientPass
from localrl.learning.update import Updater
from localrl.memory import limit as limit_module
from localrl.memory.limit import LATER, Limit, parse_limit, show
from localrl.memory.machine import Machine
from localrl.memory.plan import cache_bytes, fit
from localrl.policy.tokenizer import load_tokenizer
from localrl.rollouts.decode import Decoder
from localrl.runs.logs import read_jsonl
from localrl.train import train
from localrl.training import prompt_lengths
from localrl.training.checkpointer import MOST_REFUSALS
from localrl.training.memory_plan import plan_request, sizes_of
from localrl.training.session import NullProgress

MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2000,
}
"""With so many tokens hardly any completion ends by itself: all are as long as was planned for."""
SETTINGS = {
    "task.name": "sums",
    "task.eval_prompts": 1,
    "rollout.prompts_per_step": 2,
    "rollout.group_size": 8,
    "rollout.max_prompt_tokens": 24,
    "rollout.max_completion_tokens": 24,
    "learning.lr": 0.01,
    "run.steps": 2,
}
TREES = {
    "rollout.strategy": "tree",
    "rollout.fork_rule": "periodic",
}
BESIDE = 100_000_000
"""Bytes that a run's process is taken to hold besides MLX's arrays."""
THIRD = "def third(completion_ids):\n    return [sum(ids) % 3 == 0 for ids in completion_ids]\n"


class Recorder(NullProgress):
    """Who remembers the warnings of a run."""

    def __init__(self):
        self.warnings = []

    def warn(self, line):
        self.warnings.append(line)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    tiny.make_folder(folder / "model", bits=None, **MODEL)
    (folder / "third.py").write_text(THIRD)
    return folder


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No constants of other tests, and nothing of what they made this process hold."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(limit_module, "beside_mlx", lambda machine, held: BESIDE)


def config(place, out, model=None, **changes):
    reward = {"task.rewards": f"{place / 'third.py'}:third"}
    where = {"model.path": str(model or place / "model"), "run.out": str(out)}
    return RunConfig.create({**SETTINGS, **reward, **where, **changes})


def run(place, out, *, model=None, resume=False, progress=None, **changes):
    gc.collect()
    mx.clear_cache()
    made = config(place, out, model, **changes)
    return train(made, resume=resume, progress=progress)


def leaving(size):
    """The setting under which MLX gets this many bytes."""
    return f"{int(size + BESIDE) // 10**4 / 100:.2f}MB"


def steps(folder):
    return [line for line in read_jsonl(folder / "metrics.jsonl") if "reward" in line]


def events(folder, kind):
    return [event for event in read_jsonl(folder / "events.jsonl") if event["kind"] == kind]


def plan_of(folder):
    return json.loads((folder / "plan.json").read_bytes())


def adapter(folder):
    return mx.load(str(folder / "adapter" / "adapters.safetensors"))


def assert_alike(one, other, atol=1e-4):
    """Two runs have made the same adapter, but for rounding, from the same completions."""
    a, b = adapter(one), adapter(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(np.array(a[name]), np.array(b[name]), atol=atol)
    assert ids(one) == ids(other)


def ids(folder):
    groups = read_jsonl(folder / "rollouts.jsonl")
    return [[node["token_ids"] for node in group["nodes"]] for group in groups]


def assert_below(folder, limit):
    """Every step kept to the limit, with all buffers that MLX may keep."""
    kept = cache_bytes(limit, on_cpu=True)
    for line in steps(folder):
        assert line["memory/cache_bytes"] <= kept
        assert line["memory/peak_bytes"] + kept <= limit
    (told,) = events(folder, "memory")
    assert told["peak_bytes"] + kept <= limit


@pytest.fixture(scope="module")
def unlimited(place, tmp_path_factory):
    """A run with all of the machine's memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return run(place, tmp_path_factory.mktemp("unlimited") / "run")


def test_plan_against_peak(unlimited):
    """Before the run it is said what it will take, and afterwards what it took."""
    plan = plan_of(unlimited.folder)
    (told,) = events(unlimited.folder, "memory")
    peak = told["peak_bytes"]
    assert (told["predicted_bytes"], told["limit_bytes"]) == (
        plan["predicted_bytes"], plan["limit_bytes"],
    )  # fmt: skip
    assert peak == unlimited.peak_bytes
    assert peak >= max(line["memory/peak_bytes"] for line in steps(unlimited.folder))
    assert abs(plan["predicted_bytes"] - peak) < max(0.3 * peak, 16 * 2**20)
    line = memory(unlimited)
    assert re.fullmatch(r"memory of MLX: predicted at most \d+ MB, measured \d+ MB, limit .*", line)
    assert f"measured {peak / 1e6:.0f} MB" in line
    unknown = replace(unlimited.plan, predicted_bytes=None, limit_bytes=None)
    assert "predicted at most unknown" in memory(replace(unlimited, plan=unknown))


def test_a_plan_counts_the_prompts_that_there_are(place, tmp_path, unlimited):
    """Not those that are allowed."""
    result = run(place, tmp_path / "run", **{"rollout.max_prompt_tokens": 2000})
    plan = plan_of(result.folder)
    assert plan["predicted_bytes"] < 1.1 * plan_of(unlimited.folder)["predicted_bytes"]
    assert abs(plan["predicted_bytes"] - result.peak_bytes) < 0.3 * result.peak_bytes
    longest = max(prompt_lengths_of(result.folder, place / "model").values())
    assert longest <= plan["max_prompt_tokens"] <= 2 * longest
    assert f"prompts of up to {plan['max_prompt_tokens']} tokens" in plan["reason"]
    assert wanted_for(place, 2000) > 3 * plan["predicted_bytes"]


def wanted_for(place, prompt_tokens):
    """The prediction for prompts of so many tokens."""
    request = plan_request(
        config(place, "", **{"rollout.max_prompt_tokens": prompt_tokens}),
        sizes_of(place / "model", 0),
        Machine("Linux", "cpu", total_bytes=10**12, available_bytes=10**12),
    )
    return fit(request).predicted_bytes


def prompt_lengths_of(folder, model):
    """The longest prompt of each step."""
    tokenizer, found = load_tokenizer(model), {}
    for group in read_jsonl(folder / "rollouts.jsonl"):
        step = group["step"]
        found[step] = max(found.get(step, 0), len(tokenizer.encode(group["messages"])))
    return found


@pytest.mark.exact
def test_a_longer_prompt_than_was_planned_for_changes_the_plan_before_its_step(
    place, tiny_folder, tmp_path, monkeypatch
):
    few = {"model": tiny_folder, "run.steps": 4, "memory.limit": leaving(100e6)}
    whole = run(place, tmp_path / "whole", **few)
    monkeypatch.setattr(prompt_lengths, "ENDLESS", 1)
    monkeypatch.setattr(prompt_lengths, "MARGIN", 10**6)
    heard, out = Recorder(), tmp_path / "run"
    result = run(place, out, progress=heard, **few)
    lengths = prompt_lengths_of(out, tiny_folder)
    told = events(out, "plan")
    assert told
    for event in told:
        was, now = event["changed"]["max_prompt_tokens"]
        assert was < now == lengths[event["step"]]
        assert event["reason"] == f"a prompt has {now} tokens, more than was planned for"
        assert any(line.startswith(event["reason"]) for line in heard.warnings)
    assert result.plan.max_prompt_tokens == max(lengths.values())
    assert "as seen in training" in plan_of(out)["reason"]
    assert (result.plan.group_size, result.plan.max_completion_tokens) == (8, 24)
    assert_alike(whole.folder, out)


@pytest.mark.parametrize("share", [1.3, 1.0, 0.5, 0.1])
def test_under_any_limit_it_runs_below_or_refuses(place, tmp_path, monkeypatch, unlimited, share):
    limit = int(share * unlimited.peak_bytes)
    loaded, load_model = [], resolved().load_model
    monkeypatch.setattr(
        resolved(),
        "load_model",
        lambda *args, **more: loaded.append(1) or load_model(*args, **more),
    )
    fits, told = True, ""
    count = {"run.steps": 2 if share >= 1 else 1}
    try:
        result = run(place, tmp_path / "run", **count, **{"memory.limit": leaving(limit)})
    except MemoryBudgetError as error:
        fits, told = False, str(error)
    if not fits:
        assert share < 1.3
        assert not loaded
        assert not (tmp_path / "run").exists()
        named = re.search(r"--memory-limit (\d+)MB", told)
        assert named
        result = run(place, tmp_path / "run", **count, **{"memory.limit": f"{named[1]}MB"})
    assert result.steps == count["run.steps"]
    assert_below(result.folder, result.plan.limit_bytes)
    assert fits or result.plan.limit_bytes > limit
    assert result.plan.max_completion_tokens == 24 or share < 1.3


PEAK = """
import json, re, sys
from pathlib import Path
from localrl.config import RunConfig
from localrl.train import train
result = train(RunConfig.create(json.loads(sys.argv[1])))
# Not ru_maxrss, which holds the memory of the process that started this one.
peak = 1024 * int(re.search("VmHWM: *\t *([0-9]+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps([result.plan.limit_bytes, result.peak_bytes, peak]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's file")
def test_a_limit_holds_for_the_process(place, tmp_path):
    """Python and the libraries included, which hold more than MLX does here."""
    settings = config(place, tmp_path / "run", **{"memory.limit": "200MB", "run.steps": 1})
    given = {key: settings.value(key) for key in keys() if settings.value(key) is not None}
    text = json.dumps({**given, "task.rewards": list(given["task.rewards"])})
    told = subprocess.run(
        [sys.executable, "-c", PEAK, text], check=True, capture_output=True, text=True, timeout=100
    )
    limit, mlx, process = json.loads(told.stdout.splitlines()[-1])
    whole = parse_limit("200MB")
    assert mlx < limit < whole - LATER
    assert limit + LATER < process <= whole
    assert f"limit {show(limit)} (memory.limit: 200MB, minus" in plan_of(tmp_path / "run")["reason"]


def resolved():
    from localrl.training import resolved

    return resolved


def test_half_of_the_memory_changes_batches_alone(place, tmp_path, monkeypatch):
    found, gradient = [], GradientPass.__call__

    def watched(self, batch, plan, first=None):
        found[:] = [gradient(self, batch, plan, first)]  # one: those kept would count as memory
        return found[0]

    monkeypatch.setattr(GradientPass, "__call__", watched)
    results, gradients = [], []
    for limit in (100e6, 50e6):
        large = {"memory.limit": leaving(limit), "rollout.prompts_per_step": 8, "run.steps": 1}
        results.append(run(place, tmp_path / f"{limit}", **large))
        gradients.append(found.pop()[0])
    whole, half = (result.plan for result in results)
    assert half.micro_rows < whole.micro_rows
    assert (half.group_size, half.max_completion_tokens) == (8, 24)
    one, other = ([*read_jsonl(result.folder / "rollouts.jsonl")] for result in results)
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a["nodes"], b["nodes"], strict=True):
            assert x["token_ids"] == y["token_ids"]
            np.testing.assert_allclose(x["sampled_logprobs"], y["sampled_logprobs"], atol=1e-4)
    assert relative_difference(gradients[0], gradients[1]) < 1e-5
    assert all(events(result.folder, "plan") == [] for result in results)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("group_size", TREES),
        (
            "max_completion_tokens",
            {"rollout.max_completion_tokens": 128, "rollout.group_size": 2, "lora.rank": 1},
        ),
    ],
)
def test_a_smaller_group_or_length_is_said_aloud(place, tmp_path, name, settings):
    heard = Recorder()
    request = plan_request(
        config(place, "", **settings),
        sizes_of(place / "model", 0),
        Machine("Linux", "cpu", total_bytes=10**12, available_bytes=10**12),
    )
    wish = getattr(request.plan, name)
    limit = next(
        size
        for size in (int(6e7 * 0.97**n) for n in range(100))
        if getattr(under(request, size), name) < wish
    )
    result = run(
        place, tmp_path / "run", progress=heard, **settings,
        **{"memory.limit": leaving(limit), "run.steps": 1, "task.eval_prompts": 0},
    )  # fmt: skip
    now = getattr(result.plan, name)
    assert now < wish
    assert f"{name} {wish} -> {now}" in plan_of(result.folder)["reason"]
    (event,) = [e for e in events(result.folder, "plan") if e["step"] == 0]
    assert event["changed"][name] == [wish, now]
    assert any(line.endswith(f"{name} {wish} -> {now}") for line in heard.warnings)
    if name == "max_completion_tokens":
        assert steps(result.folder)[0]["completions/max_length"] == now
    else:
        groups = read_jsonl(result.folder / "rollouts.jsonl")
        assert 1 < max(len(group["leaves"]) for group in groups) <= now


def under(request, size):
    return fit(replace(request, limit=Limit(size, "a test", from_machine=False)))


EVERYTHING = {
    "task.train_prompts": 6,
    "task.eval_prompts": 2,
    "rollout.prompts_per_step": 2,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 10,
    "rollout.strategy": "adaptive",
    "rollout.reuse": 0.5,
    "learning.updates_per_step": 2,
    "learning.lr": 0.002,
    "learning.warmup_steps": 0,
    "run.steps": 3,
    "run.eval_every": 2,
    "run.checkpoint_every": 1,
}
"""Everything that a step remembers, on a model of 0.1 M weights."""
REFUSED = "[malloc] Unable to allocate 123 bytes."
POISONED = "[METAL] Command buffer execution failed: Insufficient Memory (00000008)"


@pytest.fixture(scope="module")
def whole(place, tiny_folder, tmp_path_factory):
    return run(
        place, tmp_path_factory.mktemp("whole") / "run", model=tiny_folder, **EVERYTHING
    ).folder


def failing(monkeypatch, kind, name, at, text, *, times=1):
    """Let a method raise after its work, from the `at`-th call on, so many times."""
    work, calls = getattr(kind, name), []

    def wrapped(self, *arguments, **named):
        calls.append(1)
        done = work(self, *arguments, **named)
        if at <= len(calls) < at + times:
            raise RuntimeError(text)
        return done

    monkeypatch.setattr(kind, name, wrapped)
    return calls


@pytest.mark.exact
@pytest.mark.parametrize(
    ("kind", "name", "at"),
    [
        (Updater, "_apply", 3),  # the first of two updates in the second step
        (Updater, "_drift", 2),  # after both
        (Decoder, "prefill", 1),  # before anything else: the first evaluation
        (Decoder, "_forward", 25),  # while a step's completions are decoded
    ],
)
def test_after_a_refusal_a_step_is_done_again_with_less(
    place, tiny_folder, tmp_path, monkeypatch, whole, kind, name, at
):
    heard = Recorder()
    failing(monkeypatch, kind, name, at, REFUSED)
    result = run(place, tmp_path / "run", model=tiny_folder, progress=heard, **EVERYTHING)
    (event,) = events(result.folder, "plan")
    assert event["reason"] == REFUSED
    assert event["changed"]["decode_rows"] == [8, 6]
    assert any(line.startswith(REFUSED) for line in heard.warnings)
    assert plan_of(result.folder)["decode_rows"] == 6
    assert [line["step"] for line in steps(result.folder)] == [1, 2, 3]
    assert_alike(result.folder, whole)
    told, expected = steps(result.folder), steps(whole)
    for key in ("rewards/failures", "rollout/reused_tokens", "num_tokens"):
        assert [line[key] for line in told] == [line[key] for line in expected]


def test_refused_again_and_again_it_ends_and_can_go_on(
    place, tiny_folder, tmp_path, monkeypatch, whole
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        calls = failing(patch, Updater, "_drift", 3, REFUSED, times=1000)
        with pytest.raises(RuntimeError, match="Unable to allocate 123 bytes"):
            run(place, out, model=tiny_folder, **EVERYTHING)
    assert len(calls) == 2 + MOST_REFUSALS + 1
    told = events(out, "plan")
    assert [event["step"] for event in told] == [3] * MOST_REFUSALS
    assert plan_of(out)["decode_rows"] == told[-1]["changed"]["decode_rows"][1] < 4
    assert run(place, out, model=tiny_folder, resume=True, **EVERYTHING).steps == 3
    assert_alike(out, whole)
    assert [line["step"] for line in steps(out)] == [1, 2, 3]


@pytest.mark.parametrize(("text", "newest"), [(POISONED, 2), ("something else", 3)])
def test_after_a_failed_command_buffer_nothing_more_is_saved(
    place, tiny_folder, tmp_path, monkeypatch, text, newest
):
    """Step 3 was done, but not yet saved; step 4 fails."""
    out = tmp_path / "run"
    failing(monkeypatch, Updater, "_drift", 4, text)
    settings = {"rollout.prompts_per_step": 2, "rollout.group_size": 2, "run.steps": 4}
    settings |= {"run.checkpoint_every": 2, "task.eval_prompts": 0}
    with pytest.raises(RuntimeError, match=re.escape(text)):
        run(place, out, model=tiny_folder, **settings)
    saved = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    assert saved[-1] == f"step-{newest:06d}"
    assert events(out, "plan") == []
    assert not (out / "adapter").exists()


CALM = Machine("Linux", "cpu", total_bytes=10**11, available_bytes=10**11, pressure="normal")
NEED = {
    1: (replace(CALM, pressure="warn"), "memory pressure is warn"),
    2: (replace(CALM, available_bytes=10**9), "only 1.0 GB of this machine's"),
}
"""The readings after the first two steps, and what is said of them."""


def test_in_need_the_run_goes_on_with_less(place, tiny_folder, tmp_path, monkeypatch, whole):
    """And a resumed run keeps to it."""
    readings = iter([machine for machine, _ in NEED.values()])
    monkeypatch.setattr("localrl.training.session.read_machine", lambda: next(readings, CALM))
    heard, out = Recorder(), tmp_path / "run"
    run(place, out, model=tiny_folder, progress=heard, **EVERYTHING | {"run.steps": 2})
    told = events(out, "plan")
    assert [event["step"] for event in told] == [1, 2]
    assert [event["changed"]["decode_rows"] for event in told] == [[8, 6], [6, 4]]
    for event in told:
        reason = NEED[event["step"]][1]
        assert reason in event["reason"]
        assert any(reason in line and "from now on: decode_rows" in line for line in heard.warnings)
    planned = plan_of(out)
    again = run(place, out, model=tiny_folder, resume=True, **EVERYTHING)
    assert again.steps == 3
    assert plan_of(out) == planned == asdict(again.plan)
    assert len(events(out, "plan")) == 2
    assert_alike(out, whole)


def test_a_pinned_plan_is_used_as_it_is(place, tiny_folder, tmp_path, whole):
    plan = plan_of(whole) | {"decode_rows": 5, "micro_rows": 2, "head_chunk": 7, "reason": "mine"}
    plan |= {"grad_checkpoint": True, "limit_bytes": 10**9, "predicted_bytes": None}
    (tmp_path / "mine.json").write_text(json.dumps(plan))
    pin = {"memory.pin": str(tmp_path / "mine.json"), "memory.limit": "50%"}
    result = run(place, tmp_path / "run", model=tiny_folder, **EVERYTHING, **pin)
    assert plan_of(result.folder) == plan
    assert_alike(result.folder, whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "which is not a plan"),
        ("{}", "which is not a plan"),
        ("[1]", "which is not a plan"),
        ({"group_size": 99}, "group_size 99, more than rollout.group_size, which is 8"),
    ],
)
def test_a_pin_that_is_no_plan_for_this_run_is_refused(place, tmp_path, whole, text, message):
    pin = tmp_path / "plan.json"
    if text is not None:
        pin.write_text(json.dumps(plan_of(whole) | text) if isinstance(text, dict) else text)
    with pytest.raises(ConfigError, match=message):
        run(place, tmp_path / "run", **{"memory.pin": str(pin)})
    assert not (tmp_path / "run").exists()
