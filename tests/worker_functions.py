"""Functions that test_worker.py has called in the child process, addressed by this file's path."""

import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time

import worker_neighbour  # type: ignore  # found because it lies beside this file


def echo(value):
    return value


def neighbour():
    return worker_neighbour.NAME


def named(first, second=2):
    return [first, second]


def keywords(first, **rest):
    return [first, rest]


async def later(value):
    return value


class Checker:
    def __call__(self, value):
        return value

    @staticmethod
    def static(value):
        return ["static", value]


checker = Checker()
not_a_function = 3


def pid():
    return os.getpid()


def start_processes(count, path):
    """No more than 100, and each ends after 3 s whatever happens."""
    assert count <= 100
    with open(path, "ab", buffering=0) as file:
        for _ in range(count):
            if os.fork() == 0:
                file.write(b"%d " % os.getpid())
                time.sleep(3)
                os._exit(0)
    time.sleep(3)


def pool(processes):
    with multiprocessing.get_context("fork").Pool(processes) as workers:
        return workers.map(abs, range(-processes, 0))


def process_limit():
    return resource.getrlimit(resource.RLIMIT_NPROC)


def modules():
    return sorted(sys.modules)


def arrays():
    import numpy as np

    return [np.float32(0.5), np.arange(2), np.bool_(True)]


def fraction():
    from fractions import Fraction

    return Fraction(1, 4)


def huge_integer():
    return 10**5000


def a_set():
    return {1}


def raises():
    raise KeyError("no\nsuch key")


def exits():
    sys.exit(0)


def dies():
    os._exit(3)


def hangs():
    while True:
        pass


def tell_and_hang(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    while True:
        pass


def start_sleeper_and_hang(path):
    sleeper = subprocess.Popen(["sleep", "900"])  # longer than anybody waits for its end
    with open(path, "w") as file:
        file.write(str(sleeper.pid))
    time.sleep(900)


def hog(megabytes, seconds):
    block = bytearray(megabytes << 20)
    time.sleep(seconds)
    return len(block)


def prints(megabytes):
    for _ in range(megabytes):
        print("x" * (1 << 20))
    os.write(1, b"to the descriptor")
    return "done"


def reads_stdin():
    return sys.stdin.read()


def leaves_a_thread():
    threading.Thread(target=hangs).start()
    return "started"


def forks_and_returns():
    os.fork()
    return os.getpid()


def dies_later():
    threading.Timer(0.05, os._exit, [1]).start()
    return os.getpid()


def short(completion_ids):
    """A reward: the fewer tokens, the better."""
    return [1.0 - len(ids) / 12 for ids in completion_ids]


def high(completion_ids):
    """A reward that differs between any two completions: the mean of their tokens' ids."""
    return [sum(ids) / len(ids) / 64 for ids in completion_ids]


def even(completion_ids):
    """A reward: 1 for an even number of tokens."""
    return [float(len(ids) % 2 == 0) for ids in completion_ids]
