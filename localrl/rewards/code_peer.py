"""Two processes that call each other's functions: a completion's program, and its tests.

The program and the tests never share an interpreter. The tests see the program's names as proxies
(`Remote`); calls travel over a pair of pipes as JSON, plain values by value and everything else by
number. Results are thus compared out of the program's reach: it learns only the arguments of
calls, never the expected results. Comparing a proxy with a plain value is therefore always False,
and arithmetic with one is an error, instead of a query to the program.

This file is passed as text to both processes; it imports only the standard library.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import itertools
import json
import math
import operator
import os
import struct
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

HEADER = struct.Struct("!I")
MESSAGE_LIMIT = 32 << 20
ORDERINGS = ("__lt__", "__le__", "__gt__", "__ge__")
SOLUTION = "solution"
TESTS = "tests"


class Gone(BaseException):
    """The other process ended or sent an invalid message; `except Exception` does not catch it."""


class RemoteError(Exception):
    """An exception whose class exists only in the other process."""


class Remote:
    """A proxy for an object in the other process."""

    __slots__ = ("_remote_id", "_remote_peer")

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_remote_peer", peer)
        object.__setattr__(self, "_remote_id", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._remote_peer.ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._remote_peer.ask("get", self, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote_peer.ask("set", self, (name, value))

    def __getitem__(self, key: Any) -> Any:
        return self._remote_peer.ask("item", self, (key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._remote_peer.ask("put", self, (key, value))

    def __len__(self) -> int:
        return self._remote_peer.ask("len", self)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._remote_peer.ask("iter", self)
        while item := self._remote_peer.ask("next", iterator):
            yield item[0]

    def __next__(self) -> Any:
        item = self._remote_peer.ask("next", self)
        if not item:
            raise StopIteration
        return item[0]

    def __bool__(self) -> bool:
        return self._remote_peer.ask("bool", self) is True

    def __int__(self) -> int:
        return self._remote_peer.ask("int", self)

    def __float__(self) -> float:
        return self._remote_peer.ask("float", self)

    def __str__(self) -> str:
        return self._remote_peer.ask("str", self)

    def __repr__(self) -> str:
        return self._remote_peer.ask("repr", self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Remote):
            return False
        return self is other or self._remote_peer.ask("equal", self, (other,)) is True

    def __hash__(self) -> int:
        return hash(self._remote_id)


def next_item(iterator: Any) -> list[Any]:
    for item in iterator:
        return [item]
    return []


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda thing, *args, **kwargs: thing(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "item": lambda thing, key: thing[key],
    "put": lambda thing, key, value: thing.__setitem__(key, value),
    "len": len,
    "iter": iter,
    "next": next_item,
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "repr": repr,
    "equal": lambda thing, other: bool(thing == other),
}

READING = ("item", "len", "iter", "next", "bool", "int", "float", "str", "repr")


def allow_all(operation: str, thing: Any, args: list[Any]) -> bool:
    return True


def allow_calls(operation: str, thing: Any, args: list[Any]) -> bool:
    """Limit what the program may do with the tests' objects: it may call and read them.

    It may read attributes only of objects of the tests' own classes, and none that begins with an
    underscore: those lead to the tests' variables.
    """
    if operation in ("call", *READING):
        return True
    public = bool(args) and isinstance(args[0], str) and not args[0].startswith("_")
    return operation == "get" and public and type(thing).__module__ == TESTS


class Peer:
    """One end of the two pipes."""

    def __init__(
        self, reading: int, writing: int, allow: Callable[[str, Any, list[Any]], bool]
    ) -> None:
        self._reading = os.fdopen(reading, "rb")
        self._writing = writing
        self._allow = allow
        self._shown: list[Any] = []
        self._numbers: dict[int, int] = {}

    def ask(
        self,
        operation: str,
        thing: Remote,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        for_effect: bool = False,
    ) -> Any:
        """Ask the other process to perform an operation on one of its objects.

        Arguments are handed over as copies. With `for_effect` the first one is afterwards what the
        other process has made of it.
        """
        kwargs = kwargs or {}
        self.send(
            {
                "op": operation,
                "on": thing._remote_id,
                "args": [self.encode(value) for value in args],
                "kwargs": {name: self.encode(value) for name, value in kwargs.items()},
                "effect": for_effect,
            }
        )
        reply = self.receive()
        while "op" in reply:
            self.serve(reply)
            reply = self.receive()
        if "error" in reply:
            raise exception(str(reply["error"]), str(reply.get("message")))
        if for_effect:
            overwrite(first_of(args, kwargs), self.decode(reply.get("changed")))
        return self.decode(reply.get("value"))

    def serve(self, request: dict[str, Any]) -> None:
        """Carry out one request and reply."""
        try:
            thing = self._shown[request["on"]]
            args = [self.decode(value) for value in request["args"]]
            kwargs = {name: self.decode(value) for name, value in request["kwargs"].items()}
            if not self._allow(request["op"], thing, args):
                raise TypeError("the tests do not allow that")
            value = OPERATIONS[request["op"]](thing, *args, **kwargs)
            reply: dict[str, Any] = {"value": self.encode(value)}
            if request["effect"]:
                reply["changed"] = self.encode(first_of(args, kwargs))
        except Exception as error:
            reply = {"error": type(error).__name__, "message": str(error)[:1000]}
        self.send(reply)

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        left = memoryview(HEADER.pack(len(data)) + data)
        try:
            while left:
                left = left[os.write(self._writing, left) :]
        except OSError:
            raise Gone from None

    def receive(self) -> dict[str, Any]:
        """Read the next message. Raises `Gone` if there is none or it is invalid."""
        header = self._reading.read(HEADER.size)
        if len(header) < HEADER.size or HEADER.unpack(header)[0] > MESSAGE_LIMIT:
            raise Gone
        try:
            message = json.loads(self._reading.read(HEADER.unpack(header)[0]))
        except (ValueError, RecursionError):
            raise Gone from None
        if not isinstance(message, dict):
            raise Gone
        return message

    def encode(self, value: Any) -> Any:
        """Encode a value as JSON: as it is, in a dictionary with its kind, or by number."""
        for kind, write in WRITERS.items():
            if isinstance(value, kind):
                return write(self, value)
        if isinstance(value, Remote):
            return {"yours": value._remote_id}
        number = self._numbers.setdefault(id(value), len(self._shown))
        if number == len(self._shown):
            self._shown.append(value)
        return {"mine": number}

    def decode(self, data: Any) -> Any:
        """Decode a value from JSON. Raises an exception if it is invalid."""
        if isinstance(data, list):
            return [self.decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        ((kind, value),) = data.items()
        return READERS[kind](self, value)

    def shown(self, number: int) -> Any:
        return self._shown[number]


def written_by_kind(name: str) -> Callable[[Peer, Any], Any]:
    return lambda peer, value: {name: [peer.encode(item) for item in value]}


def decoded(make: Callable[[Any], Any]) -> Callable[[Peer, Any], Any]:
    return lambda peer, value: make(peer.decode(value))


WRITERS: dict[type | tuple[type, ...], Callable[[Peer, Any], Any]] = {
    types.NoneType: lambda peer, value: None,
    bool: lambda peer, value: value,
    int: lambda peer, value: int(value),
    float: lambda peer, value: float(value),
    str: lambda peer, value: str.__str__(value),
    list: lambda peer, value: [peer.encode(item) for item in value],
    tuple: written_by_kind("tuple"),
    set: written_by_kind("set"),
    frozenset: written_by_kind("frozenset"),
    dict: lambda peer, value: {
        "dict": [[peer.encode(k), peer.encode(v)] for k, v in value.items()]
    },
    bytes: lambda peer, value: {"bytes": value.hex()},
    bytearray: lambda peer, value: {"bytearray": value.hex()},
    complex: lambda peer, value: {"complex": [value.real, value.imag]},
    range: lambda peer, value: {"range": [value.start, value.stop, value.step]},
    Fraction: lambda peer, value: {"Fraction": str(value)},
    Decimal: lambda peer, value: {"Decimal": str(value)},
}

READERS: dict[str, Callable[[Peer, Any], Any]] = {
    "tuple": decoded(tuple),
    "set": decoded(set),
    "frozenset": decoded(frozenset),
    "dict": decoded(dict),
    "bytes": decoded(bytes.fromhex),
    "bytearray": decoded(bytearray.fromhex),
    "complex": decoded(lambda parts: complex(*parts)),
    "range": decoded(lambda parts: range(*parts)),
    "Fraction": decoded(Fraction),
    "Decimal": decoded(Decimal),
    "mine": lambda peer, value: Remote(peer, int(value)),
    "yours": lambda peer, value: peer.shown(value),
}


def first_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call; None if it has none."""
    return next(iter([*args, *kwargs.values()]), None)


def overwrite(old: Any, new: Any) -> None:
    """Copy into a list, dictionary or set the content that the called function left in it."""
    if type(old) is not type(new) or old == new:
        return
    if isinstance(old, (list, bytearray)):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)


def exception(name: str, message: str) -> Exception:
    """The built-in exception with that name, or a `RemoteError`.

    What ends a loop becomes an error, as it does in a generator: `all(map(f, values))` must not
    pass because `f` raised it.
    """
    if name in ("StopIteration", "StopAsyncIteration"):
        return RuntimeError(f"the program raised {name}")
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            error = kind(message)
            if isinstance(error, IndexError):
                error.from_program = True  # pyright: ignore[reportAttributeAccessIssue]
            return error
        except TypeError:
            pass  # one that needs more than a message
    return RemoteError(f"{name}: {message}")


def run_solution(asked: dict[str, Any]) -> None:
    """Run the program as a module, send its names, then serve calls."""
    peer = Peer(asked["read"], asked["write"], allow_all)
    module = types.ModuleType(SOLUTION)
    sys.modules[SOLUTION] = module
    exec(compile(asked["source"], f"{SOLUTION}.py", "exec"), module.__dict__)
    names, modules = {}, []
    for name, value in list(module.__dict__.items()):
        if isinstance(value, types.ModuleType):
            modules.append([name, value.__name__])
        elif is_free(name):
            names[name] = peer.encode(value)
    peer.send({"names": names, "modules": modules})
    while True:
        peer.serve(peer.receive())


def ordered(value: Any) -> Any:
    """The value, about to be compared by order. Raises ValueError if it is NaN or holds it."""
    if isinstance(value, (list, tuple)):
        for item in value:
            ordered(item)
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError("NaN is neither smaller nor larger than anything")
    return value


def by_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """`max`, `min` or `sorted`, but refusing NaN."""

    def refusing(*args: Any, key: Callable[[Any], Any] | None = None, **options: Any) -> Any:
        return function(*args, key=lambda v: ordered(v if key is None else key(v)), **options)

    return refusing


def in_order(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`operator.lt` or its like, but refusing NaN."""
    return lambda left, right: function(ordered(left), ordered(right))


def comparing(thing: Any, name: str) -> Any:
    """The attribute of a thing; if it compares by order, it refuses NaN."""
    if name == "sort" and isinstance(thing, list):
        return by_order(thing.sort)
    function = getattr(thing, name)
    if name not in ORDERINGS:
        return function
    ordered(thing)
    return lambda *others: function(*map(ordered, others))


def attribute(thing: Any, name: str, *default: Any) -> Any:
    """`getattr`, but refusing NaN in what compares by order."""
    if name in ORDERINGS and hasattr(thing, name):
        return comparing(thing, name)
    return getattr(thing, name, *default)


def method_caller(name: str, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    """`operator.methodcaller`, but refusing NaN in what compares by order."""
    return lambda thing: comparing(thing, name)(*args, **kwargs)


def looped(kind: type) -> type:
    """A class of the tests; the program's IndexError does not end a loop over its objects.

    Python loops over a class that has only `__getitem__`, and over a `Sequence`, until IndexError.
    """
    if "__getitem__" in vars(kind):
        if getattr(kind, "__iter__", None) in (None, Sequence.__iter__):
            setattr(kind, "__iter__", lambda self: steps(self, itertools.count()))  # noqa: B010
        if hasattr(kind, "__len__") and not hasattr(kind, "__reversed__"):
            backwards = lambda self: steps(self, reversed(range(len(self))))  # noqa: E731
            setattr(kind, "__reversed__", backwards)  # noqa: B010
    return kind


def steps(sequence: Any, places: Iterable[int]) -> Iterator[Any]:
    """The items at some places, up to an IndexError; it is an error if the program raised it."""
    for place in places:
        try:
            item = sequence[place]
        except IndexError as error:
            if getattr(error, "from_program", False):
                raise RuntimeError("the program raised IndexError") from error
            return
        yield item


def for_effect(function: Any) -> Any:
    """The function, for a call whose result is not used: it may change its first argument."""
    if not isinstance(function, Remote):
        return function
    return lambda *args, **kwargs: function._remote_peer.ask(
        "call", function, args, kwargs, for_effect=True
    )


GUARDS = {
    "__ordered__": ordered,
    "__comparing__": comparing,
    "__for_effect__": for_effect,
    "__looped__": looped,
    "getattr": attribute,
    **{function.__name__: by_order(function) for function in (max, min, sorted)},
}
"""Names that the tests are given, see `code_tests`."""


def run_tests(asked: dict[str, Any]) -> None:
    """Run the tests; write one character per counted test to stdout, 1 for passed, 0 for failed."""
    results = os.dup(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    peer = Peer(asked["read"], asked["write"], allow_calls)
    module = types.ModuleType(TESTS)
    sys.modules[TESTS] = module
    module.__dict__.update(GUARDS)
    for compare in (operator.lt, operator.le, operator.gt, operator.ge):
        for name in (compare.__name__, f"__{compare.__name__}__"):
            setattr(operator, name, in_order(compare))
    operator.methodcaller = method_caller  # pyright: ignore[reportAttributeAccessIssue]
    take_names(peer.receive(), peer, module, attributes_used(asked["tests"]))
    for source, counted in asked["tests"]:
        passed = run_test(source, module)
        if counted:
            os.write(results, b"1" if passed else b"0")


def take_names(
    hello: dict[str, Any], peer: Peer, module: types.ModuleType, used: set[tuple[str, str]]
) -> None:
    """Give the tests the program's names; what they use of a standard module is never its own."""
    for name, target in hello["modules"]:
        if is_free(name) and target.partition(".")[0] in sys.stdlib_module_names:
            setattr(module, name, importlib.import_module(target))
    for name, value in hello["names"].items():
        if is_free(name):
            setattr(module, name, peer.decode(value))
    for name, attribute in used:
        if name in hello["names"] and name in sys.stdlib_module_names:
            meant = importlib.import_module(name)
            if hasattr(meant, attribute):
                setattr(module, name, meant)


def attributes_used(tests: Sequence[tuple[str, bool]]) -> set[tuple[str, str]]:
    """Pairs of a name and an attribute, such as `math` and `isclose`, that the tests use."""
    return {
        (node.value.id, node.attr)
        for source, _ in tests
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }


def is_free(name: str) -> bool:
    """True if a program may define this name for the tests; built-ins are never replaced."""
    return name.isidentifier() and not name.startswith("__") and name not in vars(builtins)


def run_test(source: str, module: types.ModuleType) -> bool:
    try:
        exec(compile(ast.parse(source), TESTS, "exec"), module.__dict__)
    except Gone:
        raise
    except BaseException:
        return False
    return True


def main() -> None:
    sys.set_int_max_str_digits(0)
    asked = json.load(sys.stdin)
    (run_solution if "source" in asked else run_tests)(asked)


if __name__ == "__main__":
    main()
