"""What the runners of all tools share; plain Python, since each tool has its own environment."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

SCALE = 2.0
"""Of the adapters."""
WINDOW = 128
"""The last completions, whose mean reward is compared with the target."""
LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class Job:
    """What a runner is to do."""

    model: str
    """Folder that transformers and mlx-lm both read."""
    data: str
    """JSON lines, each with `prompt`, a text."""
    out: str
    """File for the result."""
    steps: int
    group: int
    tokens: int
    """Of a completion."""
    max_length: int
    """Of prompt and completion together."""
    prompts: int = 1
    """Of a step."""
    rank: int = 8
    """Of the adapters, on all linear layers of all blocks."""
    rate: float = 1e-4
    """Adam's."""
    seed: int = 0
    target: float = 0.0
    """Mean reward at which to end; 0: do all steps, under a reward that means nothing."""
    reward: str = "even"
    """Which one: of even words, or "varied" for any text."""


def read_job() -> Job:
    """The job from the command line; with --blas localrl's BLAS stands before MLX's own.

    Call it before MLX and the Hub's client are imported.
    """
    parser = argparse.ArgumentParser()
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("steps", "group", "tokens", "max-length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    defaults = {"prompts": 1, "rank": 8, "seed": 0, "rate": 1e-4, "target": 0.0, "reward": "even"}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--blas", action="store_true")
    given = vars(parser.parse_args())
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    if given.pop("blas"):
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from localrl.backend import describe

        if describe().blas == "reference":
            raise SystemExit(f"no BLAS: {describe().note}")
    return Job(**given)


def rows(job: Job) -> list[dict]:
    """The rows in order, each with a `prompt` and an `answer`."""
    return [json.loads(line) for line in Path(job.data).read_text().splitlines()]


def score(job: Job, texts: list[str], answers: list[str]) -> list[float]:
    """Rewards: of the steps task where there is a target, else of words that mean nothing."""
    if not job.target:
        return [REWARDS[job.reward](text) for text in texts]
    pairs = zip(texts, answers, strict=True)
    return [float("#" in text and text.rpartition("#")[2].strip() == gold) for text, gold in pairs]


class Reached(Exception):
    """The target is reached."""


def even(text: str) -> float:
    """Share of words with an even number: words are like "w17"."""
    words = [word[1:] for word in text.split() if word[1:].isdigit()]
    return sum(int(word) % 2 == 0 for word in words) / max(len(words), 1)


def varied(text: str) -> float:
    """0 to 1, the same for the same text, and another for almost any other."""
    return zlib.crc32(text.encode()) % 1000 / 999


REWARDS = {"even": even, "varied": varied}


@dataclass
class Record:
    """Times of steps as they end."""

    versions: dict[str, str]
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Generated in each step."""
    counts: list[dict] = field(default_factory=list)
    """Forward calls and positions of each step, where they are counted."""
    rewards: list[float] = field(default_factory=list)
    """Of all completions."""
    reached_s: float | None = None
    """Seconds of training after which the last `WINDOW` completions had the target's mean."""
    _last: float = 0.0

    def start(self, job: Job) -> None:
        """The first step begins now; a process that is asked to end keeps what it has."""
        self._last = time.perf_counter()

        def end(*_: object) -> None:
            self.write(job)
            os._exit(0)

        signal.signal(signal.SIGTERM, end)

    def step(self, counts: dict | None = None) -> None:
        """A step ends now."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.counts.append(counts or {})
        self._last = now

    def check(self, job: Job) -> bool:
        """Whether the target is reached, also when it was before."""
        last = self.rewards[-WINDOW:]
        if job.target and len(last) == WINDOW and sum(last) >= job.target * WINDOW:
            self.reached_s = self.reached_s or sum(self.seconds)
        return self.reached_s is not None

    def write(self, job: Job) -> None:
        """Keep it."""
        result = {name: value for name, value in asdict(self).items() if name[0] != "_"}
        Path(job.out).write_text(json.dumps(result))


def versions(*names: str) -> dict[str, str]:
    """Installed versions of these packages."""
    return {name: metadata.version(name) for name in names}


def count_calls() -> dict[str, int]:
    """Forward calls and positions of mlx-lm's Qwen3, by kind; filled from now on."""
    import mlx_lm.models.qwen3 as family

    counts: dict[str, int] = {}
    inner = family.Model.__call__

    def counted(self, inputs, *given, **options):
        cache = options.get("cache", given[0] if given else None)
        rows, length = inputs.shape
        kind = "update" if cache is None else "decode" if length == 1 else "prefill"
        counts[f"{kind}_calls"] = counts.get(f"{kind}_calls", 0) + 1
        counts[f"{kind}_positions"] = counts.get(f"{kind}_positions", 0) + rows * length
        return inner(self, inputs, *given, **options)

    family.Model.__call__ = counted
    return counts


def take(counts: dict[str, int]) -> dict[str, int]:
    """The counts so far; they begin anew."""
    taken = dict(counts)
    counts.clear()
    return taken
