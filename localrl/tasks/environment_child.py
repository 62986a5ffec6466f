"""The child process's side of environments: their objects, and the user's code that they run.

Runs in the `processes.worker` child that rewards run in, so that rewards can use the objects. A
conversation is a number; its object lives here from its first turn until the next `observe`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from localrl.processes.worker_child import NotFound, find, load_place, wait_for

RESERVED = ("reset", "get_reward")
"""Methods of an environment that are not tools."""
MOST_TEXT = 20_000
"""Maximum characters of one answer; the rest is cut off."""

Turn = Mapping[str, Any]

_objects: dict[int, Any] = {}
"""Environment objects by conversation."""
_begun: dict[str, tuple[Mapping[str, Any], str | None]] = {}
"""The row and the text that `reset` returned for it, by example id."""


class TimeUp(BaseException):
    """Raised in code that has run too long; not an Exception, so `except Exception` misses it."""


class Tools:
    """The environment used for tools without one."""

    def reset(self, **row: Any) -> None:
        """Do nothing."""


def describe(factory: str | None, tools: Sequence[str]) -> dict[str, Any]:
    """Describe the environments, by name (`""` if there is only one).

    Each description has `name`, the class name; `plays_in_text`; `owns_reward`; and the `schemas`
    of the functions that the model may call.
    """
    return {name: _describe(make(), tools) for name, make in _factories(factory).items()}


def _describe(environment: Any, tools: Sequence[str]) -> dict[str, Any]:
    if not callable(getattr(environment, "reset", None)):
        raise TypeError(f"{type(environment).__name__} has no method reset(**row)")
    text = plays_in_text(environment)
    if text and tools:
        raise TypeError(f"{type(environment).__name__} plays in text, so it cannot have tools")
    functions = [] if text else callables(environment, tools).values()
    if not text and not functions:
        raise TypeError(
            f"{type(environment).__name__} has neither step(text) nor a method the model can call"
        )
    return {
        "name": type(environment).__name__,
        "plays_in_text": text,
        "owns_reward": callable(getattr(environment, "get_reward", None)),
        "schemas": [schema(function) for function in functions],
    }


def schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function with type hints and a Google docstring, as TRL makes it."""
    # Without this, transformers prints advice if PyTorch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils import get_json_schema  # takes 1.5 s, so import it only for tools

    return get_json_schema(function)


def plays_in_text(environment: Any) -> bool:
    """True if it has a method `step` whose only argument is `text`."""
    step = getattr(environment, "step", None)
    return callable(step) and list(inspect.signature(step).parameters) == ["text"]


def observe(
    factory: str | None, rows: Mapping[str, Mapping[str, Any]], limit_s: float
) -> list[str | None]:
    """Reset each example's environment and return its texts; earlier objects are dropped."""
    _objects.clear()
    _begun.clear()
    for key, row in rows.items():
        with time_limit(limit_s):
            _begun[key] = row, _reset(_make(factory, row), row)
    return [said for _, said in _begun.values()]


def play(
    factory: str | None, tools: Sequence[str], turns: Sequence[Turn], limit_s: float
) -> list[dict[str, Any]]:
    """Pass each turn to its environment, in order.

    A turn has `conversation` and `example`; `first`, true for the conversation's first turn;
    `copy_of` if it is the first after a fork; and `text`, or `calls`, or neither if there is
    nothing to answer. Each result has `answer` (text or None), or `results`; or `error` if the
    environment broke.
    """
    for turn in turns:  # before the originals move on
        if "copy_of" in turn and turn["copy_of"] in _objects:
            _objects[turn["conversation"]] = copy.deepcopy(_objects[turn["copy_of"]])
    return [_turn(factory, tools, turn, limit_s) for turn in turns]


def instances(ids: Sequence[int | None]) -> list[Any]:
    """The objects of conversations; None for a conversation without one."""
    return [None if number is None else _objects.get(number) for number in ids]


def own_reward(environments: Sequence[Any], name: str) -> list[Any]:
    """The own rewards of environments of this class; None for others."""
    return [
        _now(environment.get_reward()) if type(environment).__name__ == name else None
        for environment in environments
    ]


def reward_of(name: str) -> Callable[..., list[Any]]:
    """Make the reward function of environments whose class has this name."""

    def environment_reward(environments: Sequence[Any]) -> list[Any]:
        return own_reward(environments, name)

    return environment_reward


def _turn(factory: str | None, tools: Sequence[str], turn: Turn, limit_s: float) -> dict[str, Any]:
    try:
        with time_limit(limit_s):
            environment = _object(factory, turn)
        if "calls" in turn:
            named = callables(environment, tools)
            return {"results": [_call(named, call, limit_s) for call in turn["calls"]]}
        if "text" not in turn:
            return {"answer": None}
        with time_limit(limit_s):
            said = _now(environment.step(turn["text"]))
        if said is not None and not isinstance(said, str):
            raise TypeError(f"step() returned {said!r:.60}; it must be text or None")
        return {"answer": said if said is None else said[:MOST_TEXT]}
    except (Exception, TimeUp) as error:
        return {"error": _line(error)}


def _object(factory: str | None, turn: Turn) -> Any:
    """The conversation's object, created and reset if it does not exist yet."""
    number = turn["conversation"]
    if number not in _objects:
        if not turn["first"] or turn["example"] not in _begun:
            raise LookupError("the environment is gone because its process was restarted")
        row, said = _begun[turn["example"]]
        environment = _make(factory, row)
        if _reset(environment, row) != said:
            raise ValueError(
                "reset() returned two different texts for one row. All completions of a prompt are "
                "compared, so derive anything random from the row"
            )
        _objects[number] = environment
    return _objects[number]


def _call(
    named: Mapping[str, Callable[..., Any]], call: Mapping[str, Any], limit_s: float
) -> dict[str, Any]:
    """Run a call; returns its text and `failed`, true if the text is an error for the model."""
    try:
        if call.get("problem"):
            raise ValueError(call["problem"])
        if call["name"] not in named:
            raise ValueError(f"Tool {call['name']} not found.")
        with time_limit(limit_s):
            result = _now(named[call["name"]](**call["arguments"]))
        text = result if isinstance(result, str) else str(result)
    except TimeUp:
        return {"failed": True, "text": str({"error": f"the tool took more than {limit_s:g} s"})}
    except Exception as error:
        return {"failed": True, "text": str({"error": str(error)[:MOST_TEXT]})}
    return {"failed": False, "text": text[:MOST_TEXT]}


def callables(environment: Any, tools: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Functions the model may call, by name: the tools, then the environment's public methods."""
    found = {function.__name__: function for function in map(find, tools)}
    # Inspect the class: inspecting the object would compute its properties.
    for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction):
        if name not in RESERVED and not name.startswith("_"):
            found[name] = getattr(environment, name)
    return found


@functools.cache
def _factories(factory: str | None) -> dict[str, Callable[[], Any]]:
    """Factories of environments by name; one that is not in a dictionary has the name `""`."""
    if factory is None:
        return {"": Tools}
    found = load_place(factory)
    if isinstance(found, dict):
        return dict(found)
    if not callable(found):
        raise NotFound(f"{factory!r} cannot make an environment: it is a {type(found).__name__}")
    return {"": found}


def _make(factory: str | None, row: Mapping[str, Any]) -> Any:
    makers = _factories(factory)
    if "" in makers:
        return makers[""]()
    name = row.get("environment")
    if name not in makers:
        raise ValueError(
            f"the row's environment is {name!r}; it must be one of {', '.join(makers)}"
        )
    return makers[name]()


def _reset(environment: Any, row: Mapping[str, Any]) -> str | None:
    parameters = inspect.signature(environment.reset).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = row.keys() if takes_any else {p.name for p in parameters} & row.keys()
    # Each gets its own copy of the row, or one could change what the next one sees.
    said = _now(environment.reset(**{name: copy.deepcopy(row[name]) for name in names}))
    if said is not None and not isinstance(said, str):
        raise TypeError(f"reset() returned {said!r:.60}; it must be text or None")
    return said


def _now(result: Any) -> Any:
    return wait_for(result) if inspect.isawaitable(result) else result


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in code that runs longer, repeatedly until it leaves this context."""

    def ring(*_: object) -> None:
        raise TimeUp(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
