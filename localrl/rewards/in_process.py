"""Reward functions that are objects of this process, beside those that the worker calls by name.

Some are of the run itself, and are given the completions' conversations: what agents returned.

A function that was handed to `train` may come from a notebook, hold a connection or a model, or be
a lambda: no other process could import it, and a process forked from one that computes with MLX is
not safe. So it runs where it is, without a limit on time and memory. Otherwise a call is as in the
worker: arguments and results are copies, in the form of JSON, and a failure is a reply.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from localrl.processes.worker import Reply, Worker, encode_call
from localrl.processes.worker_child import (
    describe,
    invoke,
    parameters_of,
    plain,
    signature,
    wait_for,
)

PREFIX = "python:"
"""Beginning of the targets of such functions."""
ENVIRONMENTS = "environments"
"""The argument that only the worker can give: environments live there."""
Outcomes = Callable[[Sequence[int]], list[float | None]]
"""Returns the reward of each conversation, by its number."""


@dataclass(eq=False)
class InProcess:
    """Calls functions by their targets: the objects here, all others in the worker."""

    worker: Worker
    objects: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Functions by target."""
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)
    """The run's own functions of conversations, by target."""

    def resolve(self, target: str) -> Reply:
        """Return the function's required arguments, as `Worker.resolve` does."""
        if target in self.outcomes:
            return Reply(value=[ENVIRONMENTS])
        if not target.startswith(PREFIX):
            return self.worker.resolve(target)
        if target not in self.objects:
            what = "it was handed to train() as a Python object, which only that program has"
            return Reply(failure="raised", message=f"{what}: train(config, rewards=[...])")
        required = signature(parameters_of(self.objects[target]))["required"] or []
        if ENVIRONMENTS in required:
            what = f"it wants {ENVIRONMENTS!r}, which live in another process"
            return Reply(failure="raised", message=f"{what}; put the function into a file")
        return Reply(value=required)

    def wants(self, target: str, name: str) -> bool:
        """Return True if the function would be given an argument of this name."""
        if target in self.outcomes:
            return name == ENVIRONMENTS
        if target not in self.objects:
            return self.worker.wants(target, name)
        named = signature(parameters_of(self.objects[target]))["named"]
        return name != ENVIRONMENTS and (named is None or name in named)

    def call(
        self,
        target: str,
        kwargs: Mapping[str, Any],
        *,
        state: Mapping[str, Any] | None = None,
        through: Mapping[str, str] | None = None,
        limit_s: float | None = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> Reply:
        """Call the function with the arguments that it names, as `Worker.call` does.

        Raises: DataError for an argument that JSON cannot hold.
        """
        if target in self.outcomes:
            return Reply(value=self.outcomes[target](kwargs[ENVIRONMENTS]))
        if target not in self.objects:
            options: dict[str, Any] = {"through": through, "limit_s": limit_s, "waiting": waiting}
            return self.worker.call(target, kwargs, state=state, **options)
        function, parameters = self.objects[target], parameters_of(self.objects[target])
        given = {name: kwargs[name] for name in kwargs if self.wants(target, name)}
        copies = json.loads(encode_call(target, given, state, {}))["kwargs"]
        try:
            reply = invoke(function, parameters, copies, state, self._wait)
        except (Exception, SystemExit) as error:  # Ctrl-C is for the run
            below = error.__traceback__ and error.__traceback__.tb_next
            return Reply(**describe(error.with_traceback(below)))
        try:
            return Reply(**json.loads(json.dumps(reply, default=plain)))
        except (TypeError, ValueError, RecursionError) as error:
            return Reply(**{**describe(error), "failure": "bad reply"})

    def _wait(self, awaitable: Any) -> Any:
        """Return the result of an async function. A notebook's own loop runs in this thread."""
        return self._thread.submit(wait_for, awaitable).result()

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        """The thread of all async functions, always in the same loop."""
        return ThreadPoolExecutor(1, thread_name_prefix="rewards")
