"""Sets limits, then runs `program.py` from the current folder as `__main__`.

This file is passed as text to a fresh interpreter inside the sandbox, with arguments like `CPU=6`
for resource limits, `ALARM=7` for the seconds after which the process ends even if nobody kills
it, and `STARTED=5` for the descriptor that signals that the sandbox is up.
"""

import contextlib
import os
import resource
import signal
import sys


def set_limits(words: list[str]) -> None:
    for word in words:
        name, _, value = word.partition("=")
        if name == "ALARM":
            signal.alarm(int(value))
            continue
        if name == "STARTED":
            os.write(int(value), b"!")
            os.close(int(value))
            continue
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        limit = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
        with contextlib.suppress(OSError, ValueError):  # macOS refuses some kinds
            resource.setrlimit(kind, (limit, limit))


def main() -> None:
    os.nice(10)  # whatever it starts, whoever watches it must get a turn
    set_limits(sys.argv[1:])
    sys.argv[:] = ["program.py"]
    with open("program.py", "rb") as file:
        code = compile(file.read(), "program.py", "exec")
    names = sys.modules["__main__"].__dict__
    for name in ("main", "set_limits", "contextlib", "os", "resource", "signal", "sys"):
        names.pop(name, None)
    exec(code, names)


if __name__ == "__main__":
    main()
