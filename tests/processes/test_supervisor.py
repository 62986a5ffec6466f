"""The parent of a run, with real children that abort, stall and run out of memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mac_samples
import pytest
from waiting import DEADLINE_S, until

from localrl.config import RunConfig
from localrl.errors import Stopped
from localrl.memory.adapting import smaller
from localrl.processes.battery import Awake, Power, parse_pmset, read_supplies
from localrl.processes.child import Restart
from localrl.processes.heartbeat import Heartbeat
from localrl.processes.stall_detector import StallDetector, StallLimits
from localrl.processes.supervisor import describe, supervise
from localrl.records import MemoryPlan
from localrl.runs.logs import read_jsonl
from localrl.train import train

PLUGGED = Power(on_battery=False, percent=20)
CHILD = """
import ctypes, json, os, pathlib, resource, signal, socket, sys, time
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
told = json.loads(os.environ["LOCALRL_SUPERVISOR"])
channel = socket.socket(fileno=told["channel"])
run = pathlib.Path(sys.argv[1])
def tell(**message):
    channel.send(json.dumps(message).encode() + b"\\n")
def save(step):
    (run / "checkpoints" / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
with (run / "lives").open("a") as file:
    relaxed = os.environ.get("AGX_RELAX_CDM_CTXSTORE_TIMEOUT")
    life = {"arguments": sys.argv[2:], "restart": told["restart"], "relaxed": relaxed}
    file.write(json.dumps(life) + "\\n")
life = len((run / "lives").read_text().splitlines())
tell(run=str(run))
"""
"""Speaks to its supervisor as a run does."""

MEMORY = """
from localrl.backend import mx
from localrl.memory.failures import failure_of
from localrl.processes.child import OUT_OF_MEMORY
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
kept = []
try:
    while True:
        kept.append(mx.ones((2048, 2048)))
        mx.eval(kept)
except (MemoryError, RuntimeError) as error:
    sys.exit(OUT_OF_MEMORY if failure_of(error) == "refused" else 1)
"""


def command(code, run, *arguments):
    return [sys.executable, "-c", CHILD + code, str(run), *arguments]


def supervised(code, run, **options):
    """(exit code, one record for each life) of a child that is supervised from here."""
    options = {"power": lambda: PLUGGED, "awake": Awake(["true"]), **options}
    status = supervise(command(code, run), lambda there: command(code, there, "resumed"), **options)
    return status, [json.loads(line) for line in (run / "lives").read_text().splitlines()]


@pytest.mark.parametrize(
    ("death", "reason"),
    [
        ("os.abort()", "SIGABRT (it aborted)"),
        ("ctypes.string_at(0)", "SIGSEGV (a fault in compiled code)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL (killed from outside"),
        ("os._exit(134)", "SIGABRT (it aborted)"),
        ("os._exit(77)", "status 77"),
    ],
)
def test_a_run_that_dies_goes_on(tmp_path, capsys, death, reason):
    status, lives = supervised(f"if life == 1: {death}", tmp_path)
    assert status == 0
    assert lives[0] == {"arguments": [], "restart": None, "relaxed": None}
    assert lives[1]["relaxed"] is None
    told = lives[1]["restart"]
    assert lives[1]["arguments"] == ["resumed"]
    assert told["reason"].startswith(reason)
    assert (told["deaths"], told["smaller"]) == (1, True)
    assert reason in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not enforce RLIMIT_AS")
def test_a_run_that_runs_out_of_memory_goes_on(tmp_path):
    status, lives = supervised("if life == 1:" + MEMORY.replace("\n", "\n    "), tmp_path)
    assert status == 0
    assert [life["restart"] is None for life in lives] == [True, False]
    assert lives[1]["restart"]["smaller"]


def test_the_watchdog_is_no_lack_of_memory(tmp_path, capsys):
    """A process that it ends is started again with the variable that relaxes it, also later."""
    deaths = {1: "save(1)\n    os._exit(72)", 2: "os._exit(72)", 3: "save(2)\n    os.abort()"}
    code = "\n".join(f"if life == {life}:\n    {death}" for life, death in deaths.items())
    status, lives = supervised(code, tmp_path)
    assert status == 0
    assert [life["relaxed"] for life in lives] == [None, "1", "1", "1"]
    restarts = [life["restart"] for life in lives[1:]]
    assert [restart["smaller"] for restart in restarts] == [False, False, True]
    assert [restart["relaxed"] for restart in restarts] == [True] * 3
    assert [restart["deaths"] for restart in restarts] == [1, 2, 3]
    first, second, third = filter(None, capsys.readouterr().err.splitlines())
    assert "the GPU's watchdog ended its work" in first
    assert "restarts from step 1, with the same plan and AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1" in first
    assert "(pmset displaysleepnow)" in first
    assert "although AGX_RELAX_CDM_CTXSTORE_TIMEOUT is 1" in second
    assert "(death 2 of 3 without progress). Let the display sleep" in second
    assert "SIGABRT" in third
    assert "display" not in third


def test_the_watchdog_ends_a_hopeless_run(tmp_path, capsys):
    status, lives = supervised("os._exit(72)", tmp_path)
    assert (status, len(lives)) == (1, 3)
    told = capsys.readouterr().err
    assert "died 3 times without getting past the beginning" in told
    assert "Let the display sleep (pmset displaysleepnow), then continue with" in told


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 75, 130])
def test_explained_ends_are_passed_on(tmp_path, capsys, code):
    status, lives = supervised(f"os._exit({code})", tmp_path)
    assert (status, len(lives)) == (code, 1)
    assert capsys.readouterr().err == ""


QUICK = StallLimits(times=1.0, floor_s=0.1, cap_s=60.0, grace_s=0.2)
"""Ends a run soon once a step is done, and none before that, however busy the machine is."""
STALL = """
if life == 1:
    {first}
    tell(step=1)
    time.sleep(900)
"""


@pytest.mark.parametrize(
    ("first", "smaller"),
    [
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", True),
        ("signal.signal(signal.SIGTERM, lambda *_: os._exit(75))", False),
    ],
    ids=["deaf", "saves"],
)
def test_a_run_that_stalls_is_ended_and_goes_on(tmp_path, capsys, first, smaller):
    status, lives = supervised(STALL.format(first=first), tmp_path, limits=QUICK)
    assert (status, len(lives)) == (0, 2)
    assert lives[1]["restart"]["reason"].startswith("no sign of life for")
    assert lives[1]["restart"]["smaller"] is smaller
    assert "stopping the run" in capsys.readouterr().err


def test_three_deaths_without_progress_are_enough(tmp_path, capsys):
    code = "save(4)\nif life == 2: os.abort()\nos.kill(os.getpid(), signal.SIGKILL)"
    status, lives = supervised(code, tmp_path)
    assert (status, len(lives)) == (1, 3)
    told = capsys.readouterr().err
    assert "died 3 times without getting past step 4" in told
    assert "1. SIGKILL" in told
    assert "2. SIGABRT" in told
    assert "3. SIGKILL" in told
    assert f"localrl train --resume --out {tmp_path}" in told


def test_progress_makes_deaths_forgotten(tmp_path):
    status, lives = supervised("save(life // 2)\nif life < 7: os.abort()", tmp_path)
    assert (status, len(lives)) == (0, 7)
    assert lives[-1]["restart"]["deaths"] == 6


def test_a_command_that_never_got_to_a_run_is_tried_again_as_it_was(tmp_path):
    code = CHILD.replace("tell(run=str(run))", "os.abort()")
    child = [sys.executable, "-c", code, str(tmp_path)]
    options = {"power": lambda: None, "awake": Awake(["true"])}
    assert supervise(child, lambda run: pytest.fail(run), **options) == 1
    assert len((tmp_path / "lives").read_text().splitlines()) == 3


def test_patience_by_hand():
    detector = StallDetector(StallLimits(), now=0.0)
    detector.beat(5.0)
    detector.beat(8.0)
    assert detector.limit_s == 900.0, "a step may hold slower work than what was seen"
    detector.settled = True
    assert detector.limit_s == 90.0
    silences = [detector.silence(float(second)) for second in range(8, 108, 5)]
    assert silences == [None] * 19 + [95.0], "90 s after 8 are over at 103"
    detector.beat(108.0)
    assert detector.limit_s == 600.0, "six times the 100 s"
    for second in range(108, 308, 5):
        detector.silence(float(second))
    detector.beat(308.0)
    assert detector.limit_s == 900.0


def test_who_slept_himself_blames_nobody():
    detector = StallDetector(StallLimits(), now=0.0)
    detector.beat(1.0)
    detector.beat(2.0)
    detector.settled = True
    assert detector.silence(5000.0) is None
    detector.beat(5001.0)
    assert detector.limit_s == 90.0


PARENT = """
import sys
from localrl.processes.battery import Awake
from localrl.processes.supervisor import supervise
child = [sys.executable, "-c", *sys.argv[1:]]
sys.exit(supervise(child, lambda run: child, power=lambda: None, awake=Awake(["true"])))
"""
COUNTING = """
heard = []
signal.signal(signal.SIGINT, lambda *_: (heard.append(1), os.write(1, b"heard\\n")))
os.write(1, f"{os.getpid()}\\n".encode())
while not heard:
    time.sleep(0.01)
"""


@contextlib.contextmanager
def parent(code, run):
    """A supervisor in a process of its own, whose child has said its number."""
    child = command(code, run)[2:]
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, *child],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # A shell's background job ignores Ctrl-C; this one is to hear it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_first_signal_is_passed_on_once(tmp_path):
    code = COUNTING + "time.sleep(0.2)\nsys.exit(75 if len(heard) == 1 else 9)"
    with parent(code, tmp_path) as (process, _):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C reaches all of the group
        assert process.wait(DEADLINE_S) == 75
    assert len((tmp_path / "lives").read_text().splitlines()) == 1


def test_the_second_signal_ends_both_at_once(tmp_path):
    with parent(COUNTING + "time.sleep(900)", tmp_path) as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "heard\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 130
        assert process.stdout.read() == "", "the child holds it open while it lives"


def test_a_signal_ends_a_run_that_has_no_words_for_it(tmp_path):
    with parent("os.write(1, b'1\\n')\ntime.sleep(900)", tmp_path) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
    assert len((tmp_path / "lives").read_text().splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_ctrl_z_stops_and_continues_both(tmp_path):
    with parent(COUNTING, tmp_path) as (process, child):
        process.send_signal(signal.SIGTSTP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        stat = Path(f"/proc/{child}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0


REAL = {
    "task.name": "sums",
    "task.train_prompts": 6,
    "task.eval_prompts": 2,
    "rollout.prompts_per_step": 1,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 6,
    "learning.lr": 0.05,
    "run.steps": 16,
    "run.checkpoint_every": 1,
    # Nothing that a death could make smaller, so that the runs are equal in every bit.
    "memory.decode_rows": 1,
    "memory.micro_rows": 1,
    "memory.head_chunk": 1,
}
MURDEROUS = """
import os, pathlib, signal
here = pathlib.Path(__file__).parent

def score(completions, trainer_state, **_):
    victims = {3: os.getppid(), 6: int((here / "supervisor").read_text() or 0)}
    pid, done = victims.get(trainer_state.global_step), here / f"{trainer_state.global_step}.done"
    if pid and not done.exists():
        done.touch()
        os.kill(pid, signal.SIGKILL)
    return [len(str(completion)) % 5 / 4 for completion in completions]
"""
"""A reward that kills the run in its fourth step, and in its seventh the supervisor."""


def localrl(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "localrl", "train", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.exact
def test_a_killed_run_ends_as_if_nothing_had_been(tiny_folder, tmp_path):
    """The run is killed, then its supervisor; what is left saves itself and goes on by hand."""
    whole, out, file = (tmp_path / name for name in ("whole", "killed", "rewards.py"))
    file.write_text(MURDEROUS)
    settings = {**REAL, "model.path": str(tiny_folder), "task.rewards": f"{file}:score"}
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    process = localrl("--out", out, *given)
    (tmp_path / "supervisor").write_text(str(process.pid))
    told = process.stderr.read()  # until both processes are gone
    assert process.wait(DEADLINE_S) == -signal.SIGKILL, told
    assert "the run died: SIGKILL (killed from outside, as the system does when memory" in told
    assert "It restarts from step 3 (death 1 of 3 without progress)" in told
    events = {event["kind"]: event for event in read_jsonl(out / "events.jsonl")}
    assert events["resumed"]["step"] == 3
    assert events["restarted"]["deaths"] == 1
    assert events["stopped"]["reason"] == "the end of its supervisor"

    train(RunConfig.create(file=out / "config.toml"), resume=True)
    train(RunConfig.create({**settings, "run.out": str(whole)}))
    adapters = [run / "adapter" / "adapters.safetensors" for run in (whole, out)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert (whole / "rollouts.jsonl").read_bytes() == (out / "rollouts.jsonl").read_bytes()


def test_a_restart_makes_the_plan_smaller_and_keeps_it(tiny_folder, tmp_path):
    sizes = {"memory.decode_rows": 10, "memory.micro_rows": 5, "memory.head_chunk": 20}
    settings = {**REAL, **sizes, "model.path": str(tiny_folder), "run.out": str(tmp_path / "run")}

    def plan_after(steps, restart=None):
        config = RunConfig.create({**settings, "run.steps": steps})
        train(config, resume=steps > 1, restart=restart)
        plan = json.loads((tmp_path / "run" / "plan.json").read_bytes())
        return plan["decode_rows"], plan["micro_rows"], plan["head_chunk"]

    assert plan_after(1) == (10, 5, 20)
    assert plan_after(2, Restart("SIGKILL", 1, smaller=True)) == (8, 4, 16)
    assert plan_after(3, Restart("no sign of life", 2, smaller=False)) == (8, 4, 16)
    assert plan_after(4) == (8, 4, 16)
    events = [e for e in read_jsonl(tmp_path / "run" / "events.jsonl") if e["kind"] == "restarted"]
    assert [event["reason"] for event in events] == ["SIGKILL", "no sign of life"]
    assert [event["plan"]["decode_rows"] for event in events] == [8, 8]


FAILING = """
import os, sys
from localrl.learning.update import Updater
real, error, updates = Updater.update, sys.argv[1], []
cured = "--resume" in sys.argv
if "Interactivity" in error:
    cured = os.environ.get("AGX_RELAX_CDM_CTXSTORE_TIMEOUT") == "1"
def update(*given):
    updates.append(given)
    if len(updates) == 2 and not cured:
        raise RuntimeError(error)
    return real(*given)
Updater.update = update
from localrl.cli.main import main
main(["train", *sys.argv[2:]])
"""
"""`localrl train` whose second update fails as MLX does on a Mac, until it is cured."""


@pytest.mark.parametrize(
    ("error", "plan"),
    [
        (
            "[METAL] Command buffer execution failed: Impacting Interactivity "
            "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
            (10, 5, 20),
        ),
        (
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
            (8, 4, 16),
        ),
    ],
    ids=["watchdog", "memory"],
)
def test_a_run_that_the_gpu_fails_goes_on(tiny_folder, tmp_path, capfd, error, plan):
    """Each process loses the step that failed, and keeps the ones before it."""
    out = tmp_path / "run"
    sizes = {"memory.decode_rows": 10, "memory.micro_rows": 5, "memory.head_chunk": 20}
    settings = {**REAL, **sizes, "model.path": str(tiny_folder), "run.steps": 3}
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    child = [sys.executable, "-c", FAILING, error]
    ended = supervise(
        [*child, "--out", str(out), *given],
        lambda run: [*child, "--resume", "--out", run],
        power=lambda: PLUGGED,
        awake=Awake(["true"]),
    )
    told = capfd.readouterr().err
    assert ended == 0, told
    steps = [line["step"] for line in read_jsonl(out / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 3], "evaluations at both ends"
    events = list(read_jsonl(out / "events.jsonl"))
    assert [event["step"] for event in events if event["kind"] == "resumed"] == [1]
    (restart,) = (event for event in events if event["kind"] == "restarted")
    assert tuple(restart["plan"][name.partition(".")[2]] for name in sizes) == plan
    watchdog = "Interactivity" in error
    assert (restart["relaxed"], restart["smaller"]) == (watchdog, not watchdog)
    assert ("the GPU's watchdog ended work while a display is on" in told) is watchdog


def test_without_a_supervisor_the_watchdog_is_one_line(tiny_folder, tmp_path):
    error = "[METAL] Command buffer execution failed: Impacting Interactivity."
    given = ["--no-supervise", "--out", str(tmp_path / "run"), "--model", str(tiny_folder)]
    settings = [part for key, value in REAL.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-c", FAILING, error, *given, *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"Error: {error} Let the display sleep (pmset displaysleepnow), or")
    assert "Traceback" not in done.stderr


def test_the_parent_loads_nothing_heavy(tmp_path):
    """The whole way through the command, up to the child's end."""
    code = (
        "import sys, contextlib\n"
        "from localrl.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['train', '--model', 'nowhere'])\n"
        "print('LOADED', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=DEADLINE_S,
    )
    assert "no model in nowhere" in done.stderr
    loaded = set(done.stdout.split("LOADED")[1].split())
    assert "localrl.processes.supervisor" in loaded
    assert not {"mlx", "mlx.core", "mlx_lm", "numpy", "transformers", "tqdm"} & loaded


def test_on_battery_needs_a_supervisor(tmp_path):
    process = localrl("--no-supervise", "--on-battery", "run", "--out", tmp_path / "run")
    assert "Remove --no-supervise" in process.stderr.read()
    assert process.wait(DEADLINE_S) == 2


LISTENING = """
if life == 1:
    from localrl.errors import Stopped
    from localrl.processes.heartbeat import Heartbeat
    from localrl.processes.child import Supervisor
    heartbeat = Heartbeat()
    Supervisor(channel, None).watch(heartbeat.stop)
    try:
        while True:
            heartbeat.beat()
            time.sleep(0.01)
    except Stopped as stopped:
        (run / "reason").write_text(str(stopped))
        sys.exit(75)
"""


def test_a_run_pauses_while_the_battery_is_low(tmp_path, capsys):
    low = Power(on_battery=True, percent=29)
    while_paused = iter([low, low])

    def power():
        if (tmp_path / "reason").exists():
            return next(while_paused, PLUGGED)
        return low if (tmp_path / "lives").exists() else Power(True, 30)

    limits = StallLimits(power_every_s=0.05)
    status, lives = supervised(LISTENING, tmp_path, power=power, limits=limits)
    assert next(while_paused, None) is None
    assert status == 0
    assert [life["restart"] for life in lives] == [None, None], "a pause is no death"
    assert (tmp_path / "reason").read_text() == "the battery at 29 %"
    assert "paused: battery at 29 %" in capsys.readouterr().err


def test_a_run_that_may_use_the_battery_does(tmp_path):
    low = Power(on_battery=True, percent=5)
    status, lives = supervised("", tmp_path, power=lambda: low, pause=False)
    assert (status, len(lives)) == (0, 1)


@pytest.mark.parametrize("of", mac_samples.BATTERY)
def test_what_pmset_says(of):
    text, on_battery, percent = mac_samples.BATTERY[of]
    assert parse_pmset(text) == Power(on_battery, percent)


def test_what_pmset_does_not_say():
    assert parse_pmset("pmset: what is this?") is None
    assert parse_pmset("") is None


def test_what_linux_says(tmp_path):
    supplies = {
        "AC": {"type": "Mains", "online": "0"},
        "hid-mouse": {"type": "Battery", "scope": "Device", "capacity": "3"},
        "BAT0": {"type": "Battery", "status": "Discharging", "capacity": "41"},
    }
    assert read_supplies(tmp_path) is None
    for name, files in supplies.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(f"{text}\n")
    assert read_supplies(tmp_path) == Power(True, 41)
    (tmp_path / "BAT0" / "status").write_text("Charging\n")
    assert read_supplies(tmp_path) == Power(False, 41)


def test_the_machine_is_kept_awake_on_mains_power_only(tmp_path):
    there = tmp_path / "there"
    os.mkfifo(there)
    # Stands in for caffeinate: says what it was told, and stays until it is ended.
    awake = Awake(["sh", "-c", f'echo "$0 $@" > {there}; exec sleep 60', "-i", "-s", "-w"])
    awake.update(None, 41)
    awake.update(Power(True, 80), 41)
    assert awake._process is None
    awake.update(Power(False, 80), 42)
    first = awake._process
    assert there.read_text() == "-i -s -w 42\n"
    awake.update(Power(False, 81), 42)
    assert awake._process is first
    awake.update(Power(True, 80), 42)
    assert first is not None
    assert first.returncode == -signal.SIGTERM


def test_a_sleep_of_the_machine_is_noticed_once():
    now, asleep, told, slept = [100.0], [7.0], [], []
    heartbeat = Heartbeat(
        lambda: told.append(now[0]), awake=lambda: now[0], always=lambda: now[0] + asleep[0]
    )
    heartbeat.on_sleep = slept.append
    heartbeat.beat()
    asleep[0] += 9.0  # too short
    now[0] += 0.5
    heartbeat.beat()
    asleep[0] += 3600.0
    now[0] += 1.0
    heartbeat.beat()
    heartbeat.beat()
    assert slept == [3600.0]
    assert told == [100.0, 101.5]
    heartbeat.stop("enough")
    with pytest.raises(Stopped, match="enough"):
        heartbeat.beat()


def test_a_smaller_plan_changes_sizes_of_batches_alone():
    sizes = {"group_size": 8, "max_prompt_tokens": 64, "max_completion_tokens": 40}
    rest = {"grad_checkpoint": False, "dequantise": True, "threads": 2, "reason": "",
            "predicted_bytes": None, "limit_bytes": None}  # fmt: skip
    plan = MemoryPlan(**sizes, **rest, decode_rows=32, prefill_rows=10, micro_rows=5, head_chunk=16)
    once = smaller(plan, least_rows=8)
    assert once == MemoryPlan(
        **sizes, **rest, decode_rows=25, prefill_rows=8, micro_rows=4, head_chunk=12
    )
    for _ in range(20):
        once = smaller(once, least_rows=8)
    assert (once.decode_rows, once.prefill_rows) == (8, 1)
    assert (once.micro_rows, once.head_chunk) == (1, 1)


def test_ends_in_words():
    assert describe(-signal.SIGKILL).startswith("SIGKILL (killed from outside")
    assert describe(128 + signal.SIGSEGV).startswith("SIGSEGV")
    assert describe(71) == "it ran out of memory"
    assert describe(72).startswith("the GPU's watchdog ended its work")
    assert describe(99) == "status 99, which has no known meaning"
