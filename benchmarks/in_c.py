"""What the steps in C bring: rollouts and updates with and without them, in turn in one process.

    python benchmarks/in_c.py        writes benchmarks/in_c.json; a minute on two cores

8 completions of 64 tokens of the 7.3 M random Qwen3 of peers/make_model.py, behind prompts of 20
and 500 tokens. A ratio is the median over pairs of one with and one without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from localrl.backend import kernels
from localrl.bench import Wanted, decode_once, make_batch, open_bench, sample
from localrl.policy import array_attention, array_math

HERE = Path(__file__).resolve().parent
PROMPTS, ROWS, TOKENS, PAIRS = (20, 500), 8, 64, 12


def took(work: Callable[[], Any], compiled: bool) -> float:
    """Seconds of this work with the steps in C, or without."""
    array_math.kernels = array_attention.kernels = kernels if compiled else None
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(work: Callable[[], Any]) -> float:
    """How many times as long it takes without C."""
    took(work, True)
    return median(took(work, False) / took(work, True) for _ in range(PAIRS))


def measure(model: str, prompt: int) -> dict[str, float]:
    """Both parts of a step."""
    opened = open_bench(model, 0, Wanted((ROWS,), prompt, TOKENS, 1))
    batch = make_batch(opened, sample(opened, opened.endless)).batch
    return {
        "prompt_tokens": prompt,
        "rollout": ratio(lambda: decode_once(opened, ROWS)),
        "update": ratio(lambda: opened.updater.update(batch, opened.plan)),
    }


def main() -> None:
    """Measure, write and print."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(HERE / "peers" / "make_model.py"), folder], check=True)
        ratios = [measure(f"{folder}/model", prompt) for prompt in PROMPTS]
    text = json.dumps({"load": os.getloadavg(), "ratios": ratios}, indent=2) + "\n"
    Path(__file__).with_suffix(".json").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
