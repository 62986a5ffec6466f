"""The child process's side of agents: threads that run the user's function.

Runs in the `processes.worker` child that rewards run in. A thread calls the function for one
completion and reports its end to the run's server; the function's own calls go there too.
"""

from __future__ import annotations

import asyncio
import http.client
import inspect
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from localrl.processes.worker_child import describe, load, plain, signature

GIVEN = ("example", "base_url", "api_key")
"""Arguments that the function may name."""


def check(target: str) -> list[str]:
    """Return the required arguments of an agent's function that nothing will fill."""
    parameters = load(target)[1] or ()
    required = signature(parameters)["required"] or []
    unnamed = [p for p in parameters if p.kind is p.POSITIONAL_ONLY]
    wanting = [p.name for p in unnamed if p.default is p.empty or p.name in GIVEN]
    return [*wanting, *(name for name in required if name not in GIVEN)]


def start(target: str, agents: Sequence[Mapping[str, Any]], url: str, token: str) -> None:
    """Start a thread for each agent; it has `number` and `example`. url, token: of the server."""
    _go_there_directly(urlsplit(url).hostname or "")
    function, parameters = load(target)
    named = signature(parameters)["named"]
    for agent in agents:
        base = f"{url}/{agent['number']}"
        given = {"example": agent["example"], "base_url": f"{base}/v1", "api_key": token}
        kwargs = {name: given[name] for name in GIVEN if named is None or name in named}
        report = (f"{base}/result", token)
        threading.Thread(target=_run, args=(function, kwargs, *report), daemon=True).start()


def _go_there_directly(host: str) -> None:
    """Keep clients from asking a proxy for this machine's own address."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = os.environ.get(name, "")
        if host not in hosts.split(","):
            os.environ[name] = f"{hosts},{host}".lstrip(",")


def _run(function: Callable[..., Any], kwargs: Mapping[str, Any], url: str, token: str) -> None:
    try:
        value = function(**kwargs)
        if inspect.isawaitable(value):
            value = asyncio.run(_awaited(value))
        body = json.dumps({"value": value}, default=plain)
    except BaseException as error:  # SystemExit too is a failure of the agent
        below = error.__traceback__ and error.__traceback__.tb_next
        told = describe(error.with_traceback(below))
        body = json.dumps({"failure": told["message"], "traceback": told.get("traceback")})
    _post(url, token, body.encode())


async def _awaited(value: Any) -> Any:
    return await value


def _post(url: str, token: str, body: bytes) -> None:
    """Report an end. If the server is gone, so is the run, and soon this process."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port)
    try:
        connection.request("POST", place.path, body, {"Authorization": f"Bearer {token}"})
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        pass
    finally:
        connection.close()
