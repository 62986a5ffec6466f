"""A Hub of our own on 127.0.0.1, so that the real client can be tested without a network.

    with FakeHub(token="hf_fake") as hub:
        HfApi(endpoint=hub.url, token="hf_fake").create_repo("me/x", private=True)
    hub.repos["me/x"]   what arrived: private, files, commits ("datasets/me/x" for a dataset)
    hub.routes()        ["POST /api/repos/create 200", ...]

It speaks whoami, create, validate-yaml, preupload, LFS (basic, verify), the xet token and a content
store that takes everything, commit, repository info, tree and resolve with ranges. xet bytes are
stored and not decoded: what was pushed over xet cannot be pulled again.

Faults: `fail` answers with a status, `drop` closes the socket before the answer, `cut` in the
middle of the body, `stall` never answers. `token` is the only one taken; `readonly` refuses writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

import fake_hub_api
import pytest
from waiting import FOREVER_S


@dataclass
class Repo:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: dict[str, str] = field(default_factory=dict)
    """sha256 by path; kept even where the bytes went to the content store."""
    commits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def head(self) -> str:
        return self.commits[-1]["oid"] if self.commits else "0" * 40

    def commit(self, summary: str, changes: list[tuple[str, str]]) -> str:
        number = f"{summary}{len(self.commits)}".encode()
        oid = hashlib.sha1(number).hexdigest()
        self.commits.append({"oid": oid, "summary": summary, "changes": changes})
        return oid

    def oid(self, path: str) -> str:
        data = self.files[path]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        size = len(self.files[path])
        entry = {"type": "file", "path": path, "size": size, "oid": self.oid(path)}
        if path in self.lfs:
            entry["lfs"] = {"oid": self.lfs[path], "size": size, "pointerSize": 132}
        return entry


@dataclass
class Fault:
    kind: str
    method: str
    path: re.Pattern[str]
    times: int
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None


class FakeHub:
    def __init__(self, *, user: str = "me", token: str | None = None, readonly: bool = False):
        self.user, self.token, self.readonly = user, token, readonly
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.stored: list[bytes] = []
        """What the content store of xet was sent."""
        self.calls: list[tuple[str, str, int]] = []
        self.seen = b""
        """Everything that any request carried: addresses, headers and bodies."""
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, status: int, *, times: int = 1, **answer: Any) -> None:
        self.faults.append(Fault("fail", method, re.compile(path), times, status, **answer))

    def drop(self, method: str, path: str, *, times: int = 1) -> None:
        self.faults.append(Fault("drop", method, re.compile(path), times))

    def cut(self, method: str, path: str) -> None:
        self.faults.append(Fault("cut", method, re.compile(path), 1))

    def stall(self, method: str, path: str, *, times: int = 10**9) -> None:
        self.faults.append(Fault("stall", method, re.compile(path), times))

    def put(self, name: str, files: Mapping[str, bytes], *, private: bool = False) -> Repo:
        """A repository that is already there."""
        repo = self.repos[name] = Repo(private, dict(files))
        for path, data in files.items():
            if not path.endswith(fake_hub_api.TEXT):
                repo.lfs[path] = hashlib.sha256(data).hexdigest()
        repo.commit("initial", [])
        return repo

    def routes(self) -> list[str]:
        """The calls so far, without ids and hashes."""
        paths = [
            re.sub("[0-9a-f]{40,64}", "<oid>", urlsplit(path).path) for _, path, _ in self.calls
        ]
        return [f"{call[0]} {path} {call[2]}" for call, path in zip(self.calls, paths, strict=True)]

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer waits 40 ms
    hub: FakeHub
    cutting = False

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        self.body = self._read()
        self.hub.seen += b"\n".join((self.path.encode(), bytes(self.headers), self.body))
        fault = self.hub.fault(self.command, self.path)
        self.cutting = fault is not None and fault.kind == "cut"
        if fault and fault.kind == "fail":
            return self.answer(fault.body or {"error": "made to fail"}, fault.status, fault.headers)
        if fault and fault.kind in ("drop", "stall"):
            if fault.kind == "stall":
                self.hub.closing.wait(FOREVER_S)
            self.hub.calls.append((self.command, self.path, 0))
            self.close_connection = True
            return self.connection.close()
        return self._route()

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def _route(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        bearer = self.headers.get("Authorization", "")
        if hub.token and path.startswith("/api/") and bearer != f"Bearer {hub.token}":
            return self.refuse(401, "Invalid credentials in Authorization header")
        writes = "/repos/create" in path or "/commit/" in path or "/preupload/" in path
        if hub.readonly and writes:
            return self.refuse(403, "You don't have the rights to write under this namespace")
        for methods, pattern, function in fake_hub_api.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                return function(self, **match.groupdict())
        return self.refuse(404, f"the fake Hub has no {self.command} {path}")

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(
        self, value: Any = None, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.hub.calls.append((self.command, self.path, status))
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cutting else data)
        if self.cutting:
            self.close_connection = True

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer({"error": message}, status, headers)

    def repo(self, name: str, kind: str = "models") -> Repo | None:
        repo = self.hub.repos.get(name if kind == "models" else f"{kind}/{name}")
        if repo is None:
            self.refuse(404, "Repository not found", "RepoNotFound")
        return repo


def environment(hub: FakeHub, home: Path, *, xet: bool = False) -> dict[str, str]:
    """The environment of a child process whose Hub this is, with its token."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": hub.token or "",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "COLUMNS": "100",
    }


def attach(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this the Hub of the client in this process, as `environment` does for a child.

    The client has read its environment already, and every test runs with HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants

    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", hub.token or "")


@contextmanager
def terminal(answer: str) -> Iterator[TextIO]:
    """A stdin that is a terminal, on which this has been typed."""
    mine, theirs = pty.openpty()
    os.write(mine, f"{answer}\n".encode())
    with open(theirs) as stdin:
        yield stdin
    os.close(mine)
