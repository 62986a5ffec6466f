"""Rewards for programs: right ones, wrong ones, and ones that only pretend."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrl.errors import ConfigError
from localrl.processes.worker import Worker
from localrl.rewards import code, code_peer
from localrl.rewards.code import (
    UNSAFE_VARIABLE,
    CodeLimits,
    allow_unsafe_code,
    check_code_rewards,
    code_reward,
    code_reward_all,
    program_of,
    read_tests,
    score_programs,
)
from localrl.rewards.code_tests import split
from localrl.rewards.sandbox import Sandbox, unsafe_sandbox
from localrl.rewards.sandbox_process import SandboxError

GENEROUS = CodeLimits(program_s=20.0, total_s=300.0)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """What holds here; the programs of most tests are harmless, so a plain process will do too."""
    try:
        return code.find_sandbox()
    except ConfigError:
        return unsafe_sandbox()


@pytest.fixture
def nothing_holds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse() -> Sandbox:
        raise ConfigError("No working sandbox was found. Install bubblewrap.")

    monkeypatch.setattr(code, "find_sandbox", refuse)
    monkeypatch.delenv(UNSAFE_VARIABLE, raising=False)
    code._choose.cache_clear()
    yield
    code._choose.cache_clear()


def score(sandbox: Sandbox, program: str, tests: code.Tests) -> float | None:
    return score_programs([program], [tests], sandbox=sandbox, limits=GENEROUS)[0]


@pytest.mark.usefixtures("nothing_holds")
def test_without_a_sandbox_code_rewards_are_refused(tmp_path: Path) -> None:
    """Passes everywhere."""
    trace = tmp_path / "ran"
    program = f"open({str(trace)!r}, 'w').close()\ndef f(): return 1"
    for refused in (
        lambda: code_reward([program], ["assert f() == 1"]),
        lambda: code_reward_all([program], [[{"input": "", "output": ""}]]),
        check_code_rewards,
    ):
        with pytest.raises(ConfigError, match=r"Install bubblewrap.*--unsafe-code"):
            refused()
    assert not trace.exists()


@pytest.mark.usefixtures("nothing_holds")
def test_unsafe_code_is_loud_and_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNSAFE_VARIABLE, "yes")  # nothing but 1 counts
    with pytest.raises(ConfigError):
        check_code_rewards()
    allow_unsafe_code(True)
    assert check_code_rewards().startswith("UNSAFE: ")
    assert score_programs(["f = 1"], ["assert f == 1"], limits=GENEROUS) == [1.0]
    allow_unsafe_code(False)
    assert UNSAFE_VARIABLE not in os.environ
    with pytest.raises(ConfigError):
        check_code_rewards()


def test_a_sandbox_that_does_not_start_is_a_failure() -> None:
    broken = Sandbox("broken", lambda folder, command: ["sh", "-c", "exit 1"])
    for tests in ("assert f() == 1", [{"input": "", "output": ""}]):
        with pytest.raises(SandboxError):
            score_programs(["def f(): return 1"], [tests], sandbox=broken)


ADD = "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'\nimport math\nassert add([1], []) == [1]"

RIGHT = {
    "plain": ("def add(a, b): return a + b", ADD),
    "in place": (
        "def sort(values): values.sort()",
        "values = [3, 1, 2]\nsort(values)\nassert values == [1, 2, 3]",
    ),
    "exceptions": (
        "def root(x):\n    if x < 0: raise ValueError('negative')\n    return x ** 0.5",
        "try:\n    root(-1)\n    assert False\nexcept ValueError as error:\n"
        "    assert 'negative' in str(error)",
    ),
    "generators": (
        "def count():\n    n = 0\n    while True:\n        yield n\n        n += 1",
        "it = count()\nassert [next(it), next(it)] == [0, 1]\n"
        "assert [x for x, _ in zip(count(), range(3))] == [0, 1, 2]",
    ),
    "classes": (
        "class Stack:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x)\n    def pop(self): return self.items.pop()\n"
        "    def __len__(self): return len(self.items)\n"
        "    def __eq__(self, other): return self.items == other.items",
        "s = Stack()\ns.push(1)\ns.push((2, {3}))\nassert len(s) == 2\nassert s.pop() == (2, {3})\n"
        "assert s.items == [1]\nt = Stack()\nt.push(1)\nassert s == t and s != Stack()",
    ),
    "callbacks": (
        "def apply(f, xs, key=None): return [f(x) for x in xs]",
        "k = 3\nassert apply(lambda x: x * k, (1, 2), key=None) == [3, 6]",
    ),
    "objects of the tests": (
        "def total(node):\n    return node.value + total(node.next) if node else 0",
        "class Node:\n    def __init__(self, value, next=None): "
        "self.value, self.next = value, next\nassert total(Node(1, Node(2))) == 3",
    ),
    "kinds of values": (
        "def same(x): return x",
        "for x in [None, True, 10**5000, 1.5, 'é', b'b', (1, [2]), {1: {2, 3}}, frozenset('a'),\n"
        "          2j, range(3), float('inf')]:\n"
        "    assert same(x) == x and type(same(x)) is type(x)\n"
        "from fractions import Fraction\nassert same(Fraction(1, 3)) == Fraction(1, 3)",
    ),
    "modules of the program": ("import math\ndef f(): return 1.0", "assert math.isclose(f(), 1.0)"),
    "check function": (
        "def f(x): return 2 * x",
        "def check(candidate):\n    assert candidate(2) == 4\ncheck(f)",
    ),
    "not a script": (
        "def f(): return 1\nif __name__ == '__main__': raise SystemExit(1)",
        ["assert f() == 1", "x = f()\nassert x == 1"],
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(sandbox: Sandbox, name: str) -> None:
    assert score(sandbox, *RIGHT[name]) == 1.0


PRETENDERS = {
    "leaves": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves when called": "import os\ndef add(a, b): os._exit(0)",
    "raises": "def add(a, b): raise SystemExit(0)",
    "always equal": (
        "class Yes:\n"
        "    def __eq__(self, other): return True\n"
        "    def __bool__(self): return True\n"
        "    def __sub__(self, other): return 0\n"
        "    __rsub__ = __abs__ = __sub__\n"
        "    def __lt__(self, other): return True\n"
        "    def __contains__(self, other): return True\n"
        "def add(a, b): return Yes()"
    ),
    "equal list": (
        "class Yes(list):\n    def __eq__(self, other): return True\ndef add(a, b): return Yes()"
    ),
    "equal text": (
        "class Yes(str):\n    def __eq__(self, other): return True\n"
        "    __hash__ = str.__hash__\ndef add(a, b): return Yes()"
    ),
    "replaces builtins": (
        "import builtins\n"
        "class AssertionError(Exception): pass\n"
        "builtins.AssertionError = builtins.Exception = BaseException\n"
        "def abs(x): return 0\n"
        "def isinstance(*x): return True\n"
        "builtins.abs = abs\n"
        "__builtins__['abs'] = abs\n"
        "def add(a, b): return 0"
    ),
    "writes results": (
        "import os\n"
        "for fd in range(64):\n"
        "    for text in (b'1111', b'\\0\\0\\0\\x02{}'):\n"
        "        try: os.write(fd, text)\n"
        "        except OSError: pass\n"
        "def add(a, b): return None"
    ),
    "says that it is something else": (
        "import __main__, sys\n"
        "frame = sys._getframe()\n"
        "while frame:\n"
        "    for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n"
        "        if type(value).__name__ == 'Peer':\n"
        "            value.send({'names': {'__builtins__': {'mine': 0}, 'abs': {'mine': 0},\n"
        "                'AssertionError': {'mine': 0}, 'add': {'mine': 0}}, 'modules': []})\n"
        "            for _ in range(9): value.send({'value': True, 'args': []})\n"
        "    frame = frame.f_back\n"
        "def add(a, b): return 0"
    ),
    "asks for the tests' variables": (
        "def add(a, b):\n"
        "    if callable(a):\n"
        "        return a.__globals__ or a.func_globals\n"
        "    return None"
    ),
    "empties its arguments": (
        "def add(a, b):\n    if type(a) is list: a.clear(); b.clear()\n    return []"
    ),
    "floods": "while True: print('1' * 1000)",
    "prints results": "print('1111')\ndef add(a, b): print('1')",
    "no program": "I think that it is `a + b`.",
}

STRICT = (
    "assert add(1, 2) == 3\n"
    "assert abs(add(1, 2) - 3) < 1e-6\n"
    "assert add(1, 2) < 4 and add(1, 2) > 2\n"
    "assert add(1, 2) in (3, 3.0)\n"
    "assert isinstance(add(1, 2), int) and not add(1, 2) != 3\n"
    "x, y = [1], [2]\n"
    "assert add(x, y) == x + y\n"
    "assert add('a', 'b') == 'ab'\n"
    "try:\n    result = add(1, 2)\nexcept Exception:\n    pass\n"
    "else:\n    assert result == 3\n"
)


@pytest.mark.parametrize("name", PRETENDERS)
def test_pretending_gains_nothing(sandbox: Sandbox, name: str) -> None:
    if not sandbox.safe:
        pytest.skip("these need a sandbox")
    tests = STRICT if name != "raises" else STRICT.partition("try:")[0]
    assert score(sandbox, PRETENDERS[name], tests) == 0.0


def test_the_right_program_passes_the_same_tests(sandbox: Sandbox) -> None:
    assert score(sandbox, "def add(a, b): return a + b", STRICT) == 1.0


CHEATS = {
    "NaN": (
        "import math\n"
        "def f(x): return math.nan\n"
        "def inf(x): return math.inf\n"
        "def both(x): return [1.0, math.nan]\n"
        "def text(x): return 'nan'",
        [
            "assert not abs(f(2) - 4) > 1e-6",
            "d = f(2) - 4\nassert not (d < -1e-6 or d > 1e-6)",
            "if f(2) < 4 or f(2) > 4: raise AssertionError",
            "def check(g):\n    if abs(g(2) - 4) >= 1e-6: return 0\n    return 1\nassert check(f)",
            "assert max(abs(y - f(x)) if x else 0.0 for x, y in [(0, 0), (2, 4)]) < 1e-6",
            "assert min([4.0, f(2)]) == 4.0",
            "assert max([1, 2], key=lambda x: -f(x)) == 1",
            "assert sorted([1.0, f(2)]) [0] == 1.0",
            "assert not abs(inf(1) - inf(2)) > 1e-6",
            "assert not abs(float(text(2)) - 4) > 1e-6",
            "assert not [1.0, 2.0] < both(2)",
            "assert not any(abs(a - b) > 1e-6 for a, b in zip(both(2), [1.0, 2.0]))",
            "assert 3 < f(2) < 5 or not 3 < f(2)",
            "import operator\nassert not any(map(operator.gt, map(f, [1, 2]), [1, 4]))",
            "assert not abs(f(2) - 4).__gt__(1e-6)",
            "assert not list(filter((1e-6).__lt__, [f(2) - 4]))",
            "assert not float.__ge__(f(2), 1e-6)",
            "assert not getattr(f(2), '__gt__')(1e-6)",
            "import operator\nassert not operator.__gt__(f(2), 4)",
            "from operator import methodcaller\nassert not methodcaller('__gt__', 4)(f(2))",
            "xs = [1.0, f(2)]\nxs.sort()\nassert xs[0] == 1.0",
        ],
    ),
    "IndexError": (
        "def f(*x): raise IndexError\n",
        [
            "class Q:\n    def __getitem__(self, i): return f(i)\n"
            "assert all(v == i for i, v in enumerate(Q()))",
            "class Q:\n    __getitem__ = lambda self, i: f(i)\nassert list(Q()) == []",
            "class Q:\n    def __getitem__(self, i): return f(i)\nassert 3 not in Q()",
            "class Q:\n    def __getitem__(self, i): return f(i)\n    def __len__(self): return 2\n"
            "assert list(reversed(Q())) == []",
            "from collections.abc import Sequence\nclass Q(Sequence):\n"
            "    def __getitem__(self, i): return f(i)\n    def __len__(self): return 2\n"
            "assert list(Q()) == []",
        ],
    ),
    "StopIteration": (
        "def f(*x): raise StopIteration\n"
        "class Stop(StopIteration): pass\n"
        "def g(*x): raise Stop\n"
        "class Steps:\n"
        "    def __len__(self): raise StopIteration\n"
        "    def __getitem__(self, key): raise StopIteration",
        [
            "assert all(map(f, [1, 2]))",
            "for got, want in zip(map(f, [1, 2]), [2, 4]): assert got == want",
            "assert not any(a != b for a, b in zip([2, 4], map(f, [1, 2])))",
            "assert list(filter(f, [1, 2])) == []",
            "assert sum(map(f, [1, 2])) == 0",
            "for got in iter(f, 3): assert got == 3",
            "assert list(map(g, [1, 2])) == []",
            "assert all(map(len, [Steps()]))",
            "assert list(map(Steps().__getitem__ if 0 else lambda k: Steps()[k], [1])) == []",
            "import itertools\nassert list(itertools.takewhile(f, [1])) == []",
        ],
    ),
    "changed arguments": (
        "def f(*args, **kwargs):\n"
        "    for value in (*args, *kwargs.values()):\n"
        "        if hasattr(value, 'clear'): value.clear()\n"
        "def g(*args): return []",
        [
            "xs, want = [3, 1], [1, 3]\nf(xs, want)\nassert xs == want",
            "xs = [3, 1]\nassert g(f(xs)) == xs",
            "xs = {1: 2}\ny = f(xs)\nassert xs == {}",
            "xs = {1, 2}\nassert f(xs) is None and not xs",
            "xs, want = [1], [2]\nf(xs, want=want)\nassert xs == want",
            "xs, want = [1], [2]\nf(1, xs)\nassert xs == []",
            "want = [[1]]\nassert g(f(want[0])) == want[0]",
        ],
    ),
    "attributes of the tests' objects": (
        "def f(thing):\n"
        "    for act in (lambda: setattr(thing, 'value', 9), lambda: thing.items.append(9),\n"
        "                lambda: thing.items.clear(), lambda: delattr(thing, 'value')):\n"
        "        try: act()\n"
        "        except Exception: pass\n"
        "    return 9",
        [
            "class Box:\n    value = 1\nbox = Box()\nassert f(box) == box.value",
            "class Box:\n    value = 1\nbox = Box()\nf(box)\nassert box.value != 1",
            "class Box:\n    value = 1\nf(Box)\nassert Box.value == 9",
            "class Box:\n    def __init__(self): self.items = [1]\n"
            "box = Box()\nf(box)\nassert box.items != [1]",
            "import types\nbox = types.SimpleNamespace(value=1)\nf(box)\nassert box.value != 1",
        ],
    ),
    "modules of its own": (
        "class math:\n"
        "    @staticmethod\n"
        "    def isclose(*values, **options): return True\n"
        "class operator:\n"
        "    eq = staticmethod(lambda *values: True)\n"
        "def f(x): return 0",
        ["assert math.isclose(f(2), 4)", "assert operator.eq(f(2), 4)"],
    ),
}


@pytest.mark.parametrize("kind", CHEATS)
def test_no_test_is_passed_by_what_is_wrong(sandbox: Sandbox, kind: str) -> None:
    program, tests = CHEATS[kind]
    assert score(sandbox, program, tests) == 0.0


def test_the_same_kinds_of_tests_pass_what_is_right(sandbox: Sandbox) -> None:
    program = (
        "import math\n"
        "def square(x): return x * x\n"
        "def nothing(): return math.nan\n"
        "def sort(values, largest_first=False): values.sort(reverse=largest_first)\n"
        "def keep_even(values):\n"
        "    values[:] = [v for v in values if v % 2 == 0]\n"
        "    return len(values)\n"
        "def ends(): raise StopIteration('at once')\n"
        "def first(values): return values[0]"
    )
    tests = [
        "assert not abs(square(2) - 4) > 1e-6 and 3 < square(2) <= 4 < square(3)",
        "assert max(map(square, [1, -3]), key=abs) == 9 and sorted(map(square, [2, 1])) == [1, 4]",
        "assert max([], default=square(1)) == 1 and min(square(2), 3) == 3",
        "assert sorted([(1, 'b'), (1, 'a')], key=lambda p: p[0])[0] == (1, 'b')",
        "from operator import lt\nassert lt(square(2), 5) and not lt(5, square(2))",
        "assert math.isnan(nothing()) and nothing() != nothing()",
        "import math\nassert math.isclose(square(0.1), 0.01)",
        "assert [a for a, _ in zip(map(square, [1, 2]), 'ab', strict=True)] == [1, 4]",
        "xs = [2, 1]\nsort(xs)\nassert xs == [1, 2]",
        "xs = [2, 1]\nsort(values=xs, largest_first=True)\nassert xs == [2, 1]",
        "def check(f, xs, want):\n    f(xs)\n    assert xs == want\ncheck(sort, [2, 1], [1, 2])",
        "xs = [1, 2, 3, 4]\nkeep_even(xs)\nassert xs == [2, 4]",
        "class Names(list):\n    def add(self, x):\n        super().append(x)\n"
        "names = Names()\nnames.add(square(2))\nassert names == [4]",
        "exec('y = 4')\nassert square(2) == y",
        "try:\n    ends()\nexcept RuntimeError as error:\n    assert 'StopIteration' in str(error)",
        "assert (5).__gt__(square(2)) and list(filter((3).__lt__, map(square, [1, 2]))) == [4]",
        "xs = [square(2), 1]\nxs.sort(reverse=True)\nassert xs == [4, 1]",
        "class Q:\n    def __getitem__(self, i): return square([1, 2, 3][i])\n"
        "assert list(Q()) == [1, 4, 9] and Q()[1] == 4",
        "class Q:\n    def __getitem__(self, i): return first([])\n"
        "try:\n    Q()[0]\n    assert 0\nexcept IndexError: pass",
        "assert getattr(square(2), 'real') == 4 and getattr(square(2), 'none', 7) == 7",
        "class V:\n    def __init__(self, x): self.x = x\n"
        "    def __lt__(self, other): return self.x < other.x\n"
        "assert V.__lt__(V(1), V(square(2))) and sorted([V(2), V(1)])[0].x == 1",
        "seen = []\nassert [seen.append(x) for x in map(square, [1, 2])] and seen == [1, 4]",
    ]
    assert score(sandbox, program, tests) == 1.0


NUMBERS = st.integers(-3, 3) | st.floats(allow_nan=False)
OPERATORS = st.sampled_from(["<", "<=", ">", ">=", "==", "!=", "in", "is not"])


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(NUMBERS, min_size=2, max_size=4), st.lists(OPERATORS, min_size=3, max_size=3))
def test_guarded_comparisons_are_pythons(values: list[float], operators: list[str]) -> None:
    """Chains and short circuits too: each operand is evaluated as often as Python would."""
    words = ["at(0)"]
    for place, operator in zip(range(1, len(values)), operators, strict=False):
        words += [operator, f"[at({place})]" if operator == "in" else f"at({place})"]

    def outcome(source: str) -> tuple[object, list[int]]:
        asked: list[int] = []
        names = {"at": lambda place: asked.append(place) or values[place], **code_peer.GUARDS}
        try:
            exec(source, names)
        except TypeError:  # a list and a number have no order
            return "TypeError", asked
        return names["result"], asked

    source = f"result = {' '.join(words)}"
    ((guarded, _),) = split(source)
    assert outcome(guarded) == outcome(source)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.sampled_from(["<", "<=", ">", ">="]), st.lists(NUMBERS, max_size=3), st.integers(0, 3))
def test_nan_has_no_order(operator: str, values: list[float], place: int) -> None:
    """Alone and anywhere in a list, on both sides."""
    for nan in (math.nan, [*values[:place], math.nan, *values[place:]], (1, [math.nan])):
        for source in (f"nan {operator} other", f"not other {operator} nan", "max([nan, other])"):
            ((guarded, _),) = split(source)
            with pytest.raises(ValueError, match="NaN"):
                eval(guarded, {"nan": nan, "other": type(nan)(), **code_peer.GUARDS})


def test_shares_and_all_or_nothing(sandbox: Sandbox) -> None:
    wrong = "def add(a, b): return 3"
    assert score(sandbox, wrong, ADD) == pytest.approx(1 / 3)
    assert score_programs([wrong], [ADD], all_or_nothing=True, sandbox=sandbox) == [0.0]


def test_tests_before_an_endless_loop_count(sandbox: Sandbox) -> None:
    program = "def f(x):\n    while x > 1: pass\n    return x"
    limits = CodeLimits(program_s=2.0)
    tests = "assert f(0) == 0\nassert f(1) == 1\nassert f(2) == 2\nassert f(0) == 0"
    assert score_programs([program], [tests], limits=limits, sandbox=sandbox) == [0.5]


def test_pairs_of_input_and_output(sandbox: Sandbox) -> None:
    pairs = [{"input": "2\n", "output": "4"}, {"input": "3", "output": "6\n"}]
    program = "if __name__ == '__main__':\n    print(int(input()) * 2, end='  \\n\\n')"
    assert score(sandbox, program, pairs) == 1.0
    assert score(sandbox, "print(4)", pairs) == 0.5
    assert score(sandbox, "print(4)\nraise SystemExit(1)", pairs) == 0.0


def test_many_programs_keep_their_order(sandbox: Sandbox) -> None:
    programs = [[{"role": "assistant", "content": f"def f(): return {n}"}] for n in range(6)]
    tests: list[code.Tests] = ["assert f() == 3"] * 5 + [None]
    found = score_programs(programs, tests, sandbox=sandbox, limits=GENEROUS)
    assert found == [0.0, 0.0, 0.0, 1.0, 0.0, None]


def test_without_time_there_is_no_reward(
    sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = CodeLimits(program_s=2.0, total_s=1.0)
    (found,) = score_programs(["f = 1"], ["assert f == 1"], limits=limits, sandbox=sandbox)
    assert found is not None
    assert math.isnan(found)
    assert "1 of 1 programs were not run" in capsys.readouterr().err


@pytest.mark.parametrize("tests", [None, "", [], "import math", ["x = 1"]])
def test_no_tests_no_reward(tests: code.Tests) -> None:
    assert code_reward(["def f(): return 1"], [tests]) == [None]


@pytest.mark.parametrize(
    "tests", ["assert f( == 1", [{"in": "1"}], [1], ["assert f()", {"a": "b"}]]
)
def test_unreadable_tests_are_an_error(tests: code.Tests) -> None:
    with pytest.raises(ValueError, match="tests"):
        read_tests(tests)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("First\n```python\nx = 1\n```\nthen\n```py\nx = 2\n```\ndone", "x = 2\n"),
        ("```python\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1\n"),
        ("```\nx = 1\n```\n```text\nno\n```", "x = 1\n"),
        ("```python\nx = 1\n", "x = 1\n"),
    ],
)
def test_the_program_in_a_text(text: str, program: str) -> None:
    assert program_of(text) == program


def test_only_public_things_of_the_tests_are_given() -> None:
    kind = type("Node", (), {"__module__": code_peer.TESTS})
    assert code_peer.allow_calls("get", kind(), ["value"])
    assert not code_peer.allow_calls("get", kind(), ["__class__"])
    assert not code_peer.allow_calls("get", lambda: None, ["name"])
    assert not code_peer.allow_calls("put", {}, ["name", 1])
    assert not code_peer.allow_calls("set", kind(), ["value", 1])


def test_in_the_reward_process(tmp_path: Path) -> None:
    try:
        code.find_sandbox()
    except ConfigError as error:
        pytest.skip(str(error)[:200])
    own = tmp_path / "own.py"
    own.write_text(
        "from localrl.rewards.code import CodeLimits, score_programs\n"
        "def run(completions, tests):\n"
        "    limits = CodeLimits(program_s=20, total_s=50)\n"
        "    return score_programs(completions, tests, limits=limits)\n"
    )
    arguments = {"completions": ["f = 1", "f = 2"], "tests": ["assert f == 1"] * 2}
    with Worker(time_limit_s=60.0, memory_limit_bytes=None) as worker:
        assert worker.resolve("localrl.rewards.code:code_reward").value == ["completions", "tests"]
        assert worker.call(f"{own}:run", arguments).value == [1.0, 0.0]
