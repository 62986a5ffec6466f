"""The served report: it follows the run, answers this machine alone, and stays fast when long."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from waiting import DEADLINE_S

from localrl.errors import ConfigError
from localrl.report.live import LiveServer
from localrl.report.page import write_report
from localrl.report.reading import read_run
from localrl.runs.folder import reopen_run
from localrl.utils.hosts import is_loopback

LONG = 5000
LOAD_S = 10.0
"""Upper bound for a page that takes under 2 s on a free machine; tests share theirs."""


@contextmanager
def served(path):
    with LiveServer(path, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, path="", **headers):
    """The status, the headers and the body of an answer."""
    request = urllib.request.Request(
        server.url + path, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def grow(folder, first, last):
    """Append copies of the last step and its groups."""
    step = next(
        json.loads(line)
        for line in reversed((folder / "metrics.jsonl").read_text().splitlines())
        if '"reward"' in line
    )
    with (folder / "metrics.jsonl").open("a") as file:
        for n in range(first, last + 1):
            file.write(json.dumps(step | {"step": n, "reward": (n * 37 % 101) / 101}) + "\n")


def test_the_page_follows_the_run(run_copy):
    with served(run_copy) as server:
        status, headers, page = ask(server)
        assert status == 200
        assert "finished after step 2 of 2" in page
        assert ask(server, If_None_Match=headers["ETag"])[0] == 304
        grow(run_copy, 3, 3)
        with reopen_run(run_copy):
            status, later, page = ask(server, If_None_Match=headers["ETag"])
            assert (status, later["ETag"] != headers["ETag"]) == (200, True)
            assert "running, step 3 of 2 done" in page
        assert "finished after step 3" in ask(server)[2]


def test_only_this_machine_is_answered(run_copy):
    with served(run_copy) as server:
        port = server.server_address[1]
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "["):
            status, _, body = ask(server, Host=host)
            assert (status, "<html" in body) == (421, False), host
        for host in (f"localhost:{port}", "127.0.0.1:99", "[::1]:80", "LOCALHOST"):
            assert ask(server, Host=host)[0] == 200, host


def test_the_page_asks_its_own_server_alone(run_copy):
    with served(run_copy) as server:
        _, headers, page = ask(server)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "connect-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http://" not in page.split("<script>")[0]
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Access-Control-Allow-Origin"] is None
        assert ask(server, "../config.toml")[0] == ask(server, "rollouts.jsonl")[0] == 404
        write_report(read_run(run_copy), run_copy / "report.html")
        assert "fetch(" in page
        assert "fetch(" not in (run_copy / "report.html").read_text()


def test_a_run_that_is_gone(run_copy):
    with served(run_copy) as server:
        shutil.rmtree(run_copy)
        status, _, body = ask(server)
        assert (status, body.startswith("The run cannot be read: ")) == (503, True)


def test_long_runs_load_fast_and_small(run_copy):
    grow(run_copy, 3, LONG)
    groups = (run_copy / "rollouts.jsonl").read_text()
    with (run_copy / "rollouts.jsonl").open("a") as file:
        for _ in range(150):
            file.write(groups)
    started = time.monotonic()
    with served(run_copy) as server:
        page = ask(server)[2]
    written = write_report(read_run(run_copy), run_copy / "report.html")
    assert time.monotonic() - started < 2 * LOAD_S
    assert max(len(page), written.size) < 10_000_000
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    reward = next(chart for chart in data["charts"] if chart["title"] == "Reward")
    logged = [s["reward"] for s in read_run(run_copy).steps]
    for step, value in list(zip(reward["steps"], reward["lines"][0], strict=True))[1:]:
        part = logged[step[0] - 1 : step[1]]
        assert value == pytest.approx([min(part), max(part)], rel=1e-5)


def test_the_command_ends_with_ctrl_c(run_copy):
    process = subprocess.Popen(
        [sys.executable, "-m", "localrl", "show", str(run_copy), "--live"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        # A test run in the background may ignore SIGINT, which a child would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    url = process.stdout.readline().split()[0]
    assert "finished after step 2" in process.stdout.readline()
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (0, "")
    assert "no longer served" in out


def test_addresses(run_copy):
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    with served(run_copy) as server, pytest.raises(ConfigError, match="Choose another --port"):
        LiveServer(run_copy, "127.0.0.1", server.server_address[1])
