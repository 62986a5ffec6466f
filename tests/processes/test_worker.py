"""The worker against functions that behave and functions that do not, in real child processes."""

import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import DEADLINE_S, FOREVER_S, until

import localrl
from localrl.errors import DataError
from localrl.processes import worker as module
from localrl.processes.process_limit import tasks_of_user
from localrl.processes.worker import Reply, Worker, _resident_bytes_by_ps, resident_bytes

FUNCTIONS = Path(__file__).parent.parent / "worker_functions.py"
PACKAGE_PARENT = Path(localrl.__path__[0]).parent


def target(name: str) -> str:
    return f"{FUNCTIONS}:{name}"


def make_worker(time_limit_s: float = DEADLINE_S, memory_limit_bytes: int | None = None) -> Worker:
    return Worker(time_limit_s=time_limit_s, memory_limit_bytes=memory_limit_bytes)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with make_worker() as worker:
        yield worker


def is_alive(pid: int) -> bool:
    """False for a zombie too: nobody may be there to reap an orphan."""
    if sys.platform != "linux":
        return bool(resident_bytes(pid))  # 0 for a zombie
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        # The main thread is a zombie first; files are closed when the last of the others is gone.
        return not ("\nState:\tZ" in status and "\nThreads:\t1\n" in status)
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_values_come_back_as_they_were(worker: Worker) -> None:
    value = {"a": [1, 2.5, None, True, "é\n\ud800"], "b": {}}
    assert worker.call(target("echo"), {"value": value}) == Reply(value=value)


def test_nan_and_infinity_survive(worker: Worker) -> None:
    values = worker.call(target("echo"), {"value": [math.nan, math.inf, -math.inf]}).value
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf]


def test_megabytes_both_ways(worker: Worker) -> None:
    value = ["x" * 1000] * 20_000
    assert worker.call(target("echo"), {"value": value}).value == value


def test_only_named_arguments_are_given(worker: Worker) -> None:
    kwargs = {"first": 1, "third": 3}
    assert worker.call(target("named"), kwargs).value == [1, 2]
    assert worker.call(target("keywords"), kwargs).value == [1, {"third": 3}]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("later", 7),
        ("checker", 7),
        ("Checker.static", ["static", 7]),
        ("arrays", [0.5, [0, 1], True]),
        ("fraction", 0.25),
        ("neighbour", "neighbour"),
    ],
)
def test_kinds_of_functions_and_values(worker: Worker, name: str, value: object) -> None:
    assert worker.call(target(name), {"value": 7}) == Reply(value=value)


def test_resolve_tells_required_arguments(worker: Worker) -> None:
    assert worker.resolve(target("named")).value == ["first"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (target("missing"), "has no 'missing'"),
        (target("not_a_function"), "is of type int, not a function"),
        ("/nowhere/rewards.py:f", "there is no file /nowhere/rewards.py"),
        ("no_such_module.inner:f", "there is no module 'no_such_module'"),
        ("json.no_such_part:f", "there is no module 'json.no_such_part'"),
        ("just_a_name", "is neither module:function nor path/to/file.py:function"),
    ],
)
def test_unknown_targets_are_named(worker: Worker, place: str, message: str) -> None:
    reply = worker.call(place, {})
    assert reply.failure == "raised"
    assert message in reply.message
    assert reply.traceback is None


def test_failing_import_has_a_traceback(worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    reply = worker.call(f"{tmp_path}/broken.py:f", {})
    assert reply.message == "ModuleNotFoundError: No module named 'no_such_library'"
    assert 'broken.py", line 1' in (reply.traceback or "")


def test_exception_is_told_in_one_line_with_the_users_frames(worker: Worker) -> None:
    reply = worker.call(target("raises"), {})
    assert (reply.failure, reply.message) == ("raised", r"KeyError: 'no\nsuch key'")
    assert "worker_functions.py" in (reply.traceback or "")
    assert "worker_child.py" not in (reply.traceback or "")


@pytest.mark.parametrize(
    ("name", "failure", "message"),
    [
        ("exits", "raised", "SystemExit: 0"),
        ("dies", "died", "its process exited with status 3"),
        ("a_set", "bad reply", "TypeError: a value of type set cannot be sent as JSON"),
        ("huge_integer", "bad reply", "ValueError: Exceeds the limit"),
        ("named", "raised", "TypeError: named() missing 1 required positional argument"),
    ],
)
def test_failures_are_told_and_the_next_call_works(
    worker: Worker, name: str, failure: str, message: str
) -> None:
    reply = worker.call(target(name), {})
    assert reply.failure == failure
    assert reply.message.startswith(message)
    assert worker.call(target("echo"), {"value": 1}).value == 1


def test_time_limit_leaves_out_start_and_import(tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(1.5)\ndef f():\n    return 1\n")
    with make_worker(time_limit_s=1.0) as worker:
        assert worker.call(f"{slow}:f", {}) == Reply(value=1)
        reply = worker.call(target("hangs"), {})
        assert reply.message == "gave no answer within the limit of 1 s"
        assert worker.call(f"{slow}:f", {}) == Reply(value=1)


def test_start_limit_covers_the_import(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text("while True:\n    pass\n")
    with Worker(time_limit_s=DEADLINE_S, memory_limit_bytes=None, start_limit_s=0.5) as worker:
        assert worker.call(f"{tmp_path}/stuck.py:f", {}).failure == "timeout"


def test_memory_limit() -> None:
    with make_worker(memory_limit_bytes=100 << 20) as worker:
        assert worker.call(target("hog"), {"megabytes": 20, "seconds": 0.1}).ok
        # Long before it is done, and before its time is up.
        reply = worker.call(target("hog"), {"megabytes": 300, "seconds": FOREVER_S})
        assert reply.failure == "memory"
        assert reply.message.endswith("the limit is 105 MB")
        assert worker.call(target("echo"), {"value": 1}).ok


@pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps to compare with")
def test_memory_is_measured_alike_in_both_ways() -> None:
    by_ps = _resident_bytes_by_ps(os.getpid())
    assert by_ps is not None
    assert resident_bytes(os.getpid()) == pytest.approx(by_ps, rel=0.1)
    assert resident_bytes(2**22 + 1) is None


def test_too_many_processes_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, which fails the function, or by the parent, for the kernel lets root be."""
    monkeypatch.setattr(module, "worker_room", lambda: 30)
    note = tmp_path / "pids"
    with make_worker() as worker:
        reply = worker.call(target("start_processes"), {"count": 60, "path": str(note)})
        assert reply.failure in ("raised", "processes")
        if reply.failure == "processes":
            assert reply.message == "started more than 30 processes"
        assert worker.call(target("echo"), {"value": 1}).ok
    until(lambda: not any(is_alive(int(pid)) for pid in note.read_text().split()))


def test_the_limit_of_processes_is_relative_and_leaves_room_for_pools(worker: Worker) -> None:
    soft, hard = worker.call(target("process_limit"), {}).value
    tasks, inherited = tasks_of_user(), resource.getrlimit(resource.RLIMIT_NPROC)[0]
    assert tasks is not None
    assert soft == hard
    assert soft == inherited or tasks < soft < tasks + 2 * module.worker_room()
    assert worker.call(target("pool"), {"processes": 8}).value == [8, 7, 6, 5, 4, 3, 2, 1]


def test_timeout_kills_what_the_function_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with make_worker(time_limit_s=2.0) as worker:
        reply = worker.call(target("start_sleeper_and_hang"), {"path": str(note)})
    assert reply.failure == "timeout"
    until(lambda: not is_alive(int(note.read_text())))


def test_a_thread_left_behind_does_not_disturb(worker: Worker) -> None:
    assert worker.call(target("leaves_a_thread"), {}).value == "started"
    assert worker.call(target("echo"), {"value": 1}).value == 1


def test_a_forked_process_does_not_answer(worker: Worker) -> None:
    child = worker.call(target("pid"), {}).value
    assert worker.call(target("forks_and_returns"), {}).value == child
    assert worker.call(target("pid"), {}).value == child


def test_death_between_calls_is_not_blamed_on_the_next() -> None:
    with make_worker() as worker:
        child = worker.call(target("dies_later"), {}).value
        until(lambda: not is_alive(child))
        assert worker.call(target("echo"), {"value": 1}) == Reply(value=1)


def test_stdin_is_empty(worker: Worker) -> None:
    assert worker.call(target("reads_stdin"), {}) == Reply(value="")


def test_child_loads_nothing_heavy() -> None:
    with make_worker() as worker:
        loaded = set(worker.call(target("modules"), {}).value)
    assert not loaded & {"mlx", "mlx.core", "mlx_lm", "transformers", "numpy", "localrl"}


def test_unsendable_argument_is_named(worker: Worker) -> None:
    with pytest.raises(DataError, match=r"the argument 'bad' of .*:keywords cannot be sent"):
        worker.call(target("keywords"), {"first": 1, "bad": {1}})


def test_interrupted_call_leaves_no_answer_behind() -> None:
    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with make_worker() as worker:
            worker.resolve(target("hog"))
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                worker.call(target("hog"), {"megabytes": 1, "seconds": 0.4})
            assert worker.call(target("echo"), {"value": "mine"}).value == "mine"
    finally:
        signal.signal(signal.SIGALRM, old)


POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

class Scorer:
    def __init__(self, size):
        self.size = size

def one(text):
    return len(text), __file__

def score(completions, method):
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return list(pool.map(one, completions)), pool.submit(Scorer, 3).result().size
"""


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("rewards.py", "spawn"),
        ("rewards.py", "forkserver"),
        ("rewards.py", "fork"),
        ("json.py", "spawn"),  # a name of the standard library's
        ("my-rewards.v2.py", "spawn"),
        ("site/rewards.py", "spawn"),  # the second file of that name
    ],
)
def test_process_pools_work_however_they_are_started(worker, tmp_path, file, method):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(POOL)
    reply = worker.call(f"{path}:score", {"completions": ["ab", "abcd"], "method": method})
    assert reply == Reply(value=[[[2, str(path)], [4, str(path)]], 3])


def test_files_of_one_name_in_two_folders_stay_two(worker, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(f"def f():\n    return {folder!r}\n")
    places = [f"{tmp_path}/{folder}/same.py:f" for folder in "abab"]
    assert [worker.call(place, {}).value for place in places] == ["a", "b", "a", "b"]


def start_script(path: Path, text: str) -> subprocess.Popen[str]:
    path.write_text(text)
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_PARENT)}
    return subprocess.Popen(
        [sys.executable, path.name],
        cwd=path.parent,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_script_runs_once_and_its_folder_is_searched(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def f():\n    return 'found'\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('shadows the standard library')\n")
    (tmp_path / "scripts").mkdir()
    script = start_script(
        tmp_path / "scripts" / "main.py",
        "import os\nos.chdir('..')\n"
        "from localrl.processes.worker import Worker\n"
        f"worker = Worker(time_limit_s={DEADLINE_S}, memory_limit_bytes=None)\n"
        "print(worker.call('rewards:f', {}).value, worker.call('rewards.py:f', {}).value)\n",
    )
    out, err = script.communicate(timeout=DEADLINE_S)
    assert (out, err) == ("found found\n", "")


def test_output_goes_to_stderr_and_is_capped(tmp_path: Path) -> None:
    script = start_script(
        tmp_path / "main.py",
        "from localrl.processes.worker import Worker\n"
        f"with Worker(time_limit_s={DEADLINE_S}, memory_limit_bytes=None) as worker:\n"
        f"    print(worker.call({target('prints')!r}, {{'megabytes': 8}}).value)\n",
    )
    out, err = script.communicate(timeout=DEADLINE_S)
    assert out == "done\n"
    assert err.startswith("xxx")
    assert err.endswith("[localrl: further output is dropped]\n")
    assert len(err) < 20_000


def test_ctrl_c_is_for_the_parent(tmp_path: Path) -> None:
    script = start_script(
        tmp_path / "main.py",
        "import signal\n"
        "from localrl.processes.worker import Worker\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        f"with Worker(time_limit_s={DEADLINE_S}, memory_limit_bytes=None) as worker:\n"
        f"    before = worker.call({target('pid')!r}, {{}}).value\n"
        "    print('ready', flush=True)\n"
        "    input()\n"
        f"    print(worker.call({target('pid')!r}, {{}}).value == before)\n",
    )
    assert script.stdout is not None
    assert script.stdout.readline() == "ready\n"
    os.killpg(script.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    out, _ = script.communicate("\n", timeout=DEADLINE_S)
    assert out == "True\n"


def test_busy_child_ends_with_its_parent(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = start_script(
        tmp_path / "main.py",
        "from localrl.processes.worker import Worker\n"
        f"worker = Worker(time_limit_s={FOREVER_S}, memory_limit_bytes=None)\n"
        f"worker.call({target('tell_and_hang')!r}, {{'path': {str(note)!r}}})\n",
    )
    until(lambda: note.exists() and note.read_text() != "")
    child = int(note.read_text())
    assert is_alive(child)
    script.kill()
    script.communicate()
    until(lambda: not is_alive(child))
