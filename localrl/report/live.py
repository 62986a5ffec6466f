"""Serves the report of a run on this machine while the run goes on.

One resource, the page itself: it is made anew when a file of the run has changed, from what was
added to the logs. Only requests that name this machine are answered, so that a web page whose name
was pointed here (DNS rebinding) reads nothing.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from localrl.errors import ConfigError
from localrl.report import facts
from localrl.report.page import make_page, policy
from localrl.report.reading import Run, RunReader
from localrl.report.samples import GroupSampler
from localrl.report.verdict import verdict
from localrl.utils.hosts import is_loopback, names_this_machine, own_names

GROUP_BYTES = 500_000
"""Size limit of the groups in a page that is made again and again."""
LOOK_S = 2.0
"""Seconds between two looks at whether the run has ended."""
SLOW_S = 30.0
"""Seconds after which a connection that says nothing is closed."""
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class LivePage:
    """The page of a run, made anew when the run has written something."""

    def __init__(self, path: Path) -> None:
        """Raises: ConfigError if there is no run in the folder."""
        self._path = path
        self._reader, self._sampler = RunReader(path), GroupSampler(path)
        self._lock = threading.Lock()
        self._stamp, self._page = "", b""

    def get(self) -> tuple[str, bytes]:
        """Return the page with a stamp that changes with it.

        Raises: ConfigError if the run is gone.
        """
        with self._lock:
            run = self._reader.read()
            stamp = self._stamp_of(run)
            if stamp != self._stamp:
                page = make_page(run, self._sampler.sample(GROUP_BYTES), live=True)
                self._stamp, self._page = stamp, page.encode("utf-8", "replace")
            return self._stamp, self._page

    def _stamp_of(self, run: Run) -> str:
        """Return an ETag from the run's state and the times and sizes of its files."""
        found = [file.stat() for file in sorted(self._path.iterdir()) if file.is_file()]
        times = "-".join(f"{stat.st_mtime_ns:x}.{stat.st_size:x}" for stat in found)
        return f'"{id(self):x}-{run.state}-{times}"'


class LiveServer(ThreadingHTTPServer):
    """A server of one run's page."""

    daemon_threads = True

    def __init__(self, path: Path, host: str, port: int) -> None:
        """Listen; port 0 takes a free one.

        Raises: ConfigError if there is no run in the folder, or the address cannot be used.
        """
        self.page = LivePage(path)
        self.names = own_names(host)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"The report cannot be served on {host}, port {port}: {error.strerror or error}. "
                "Choose another --port, or leave it out for a free one."
            ) from error

    @property
    def url(self) -> str:
        """Address of the page."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in str(host) else host}:{port}/"


def serve(path: Path, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve the report of a run until Ctrl-C, and tell when the run ends or goes on again.

    Raises: ConfigError if there is no run in the folder, or the address cannot be used.
    """
    reader = RunReader(path)
    with LiveServer(path, host, port) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if not is_loopback(host):
            tell(
                f"warning: whoever reaches {host} can read this run's prompts and completions; "
                "there is no password. Leave out --host to serve this machine alone."
            )
        tell(f"{server.url}  the report of {path}, as it goes on; Ctrl-C ends it")
        try:
            _watch(reader, tell)
        except KeyboardInterrupt:
            tell("\nno longer served")
        finally:
            server.shutdown()


def _watch(reader: RunReader, tell: Callable[[str], None]) -> None:
    """Tell each change of the run's state, forever."""
    known, pause = "running", threading.Event()
    while True:
        run = reader.read()
        if run.state != known:
            known = run.state
            tell(f"{facts.state(run)}. {verdict(run)} The page stays here until Ctrl-C.")
        pause.wait(LOOK_S)


class _Handler(BaseHTTPRequestHandler):
    """Answers with the page, with "not modified", or with the reason why not."""

    server: LiveServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = SLOW_S
    server_version, sys_version = "localrl", ""

    def do_GET(self) -> None:
        if not names_this_machine(self.headers.get("Host", ""), self.server.names):
            self._answer(
                HTTPStatus.MISDIRECTED_REQUEST, b"This server answers to its own name only."
            )
        elif self.path != "/":
            self._answer(HTTPStatus.NOT_FOUND, b"There is only the page /.")
        else:
            self._page()

    do_HEAD = do_GET

    def _page(self) -> None:
        try:
            stamp, page = self.server.page.get()
        except (ConfigError, OSError) as error:
            self._answer(
                HTTPStatus.SERVICE_UNAVAILABLE, f"The run cannot be read: {error}".encode()
            )
            return
        if self.headers.get("If-None-Match") == stamp:
            self._answer(HTTPStatus.NOT_MODIFIED, b"", stamp)
        else:
            self._answer(HTTPStatus.OK, page, stamp, "text/html")

    def _answer(
        self, status: HTTPStatus, body: bytes, stamp: str = "", kind: str = "text/plain"
    ) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", f"{policy(True)}; frame-ancestors 'none'")
        if stamp:
            self.send_header("ETag", stamp)
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a page that follows a run asks every few seconds."""
