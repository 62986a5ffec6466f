"""What the steps in C bring: rollouts and updates with and without them, in turn in one process.

    python benchmarks/in_c.py        writes benchmarks/in_c.json; some minutes on two cores

8 completions of 64 tokens of the 7.3 M random Qwen3 of peers/make_model.py behind prompts of 20 and
500 tokens, and 1 to 32 of 24 tokens of SmolLM2 behind 45, where that was pulled. Without them NumPy
computes all, with the same team of threads for its products. A ratio is the median over pairs of
one with and one without.
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

from localrl.diagnostics.bench import BenchRequest, decode_once, make_batch, open_bench, sample
from localrl.engines.cpu.kernel_choice import NUMPY, current, using
from localrl.utils.packaged import PACKAGED_MODELS, find_packaged

HERE = Path(__file__).resolve().parent
PROMPTS, ROWS, TOKENS, PAIRS = (20, 500), 8, 64, 12
REAL, REAL_ROWS = "smollm2-135m", (1, 2, 4, 8, 16, 32)
REAL_PROMPT, REAL_TOKENS, REAL_PAIRS = 45, 24, 5


def took(work: Callable[[], Any], compiled: bool) -> float:
    """Seconds of this work with the steps in C, or without."""
    with using(current() if compiled else NUMPY):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


def ratio(work: Callable[[], Any], pairs: int) -> float:
    """How many times as long it takes without C."""
    took(work, True)
    return median(took(work, False) / took(work, True) for _ in range(pairs))


def measure(model: str, rows: int, prompt: int, tokens: int, pairs: int) -> dict[str, Any]:
    """Both parts of a step."""
    opened = open_bench(model, 0, BenchRequest((rows,), prompt, tokens, 1))
    batch = make_batch(opened, sample(opened, opened.endless)).batch
    return {
        "model": Path(model).name,
        "rows": rows,
        "prompt_tokens": prompt,
        "rollout": ratio(lambda: decode_once(opened, rows), pairs),
        "update": ratio(lambda: opened.updater.update(batch, opened.plan), pairs),
    }


def main() -> None:
    """Measure, write and print."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(HERE / "peers" / "make_model.py"), folder], check=True)
        ratios = [measure(f"{folder}/model", ROWS, n, TOKENS, PAIRS) for n in PROMPTS]
    if find_packaged(PACKAGED_MODELS[REAL]) is not None:
        given = REAL_PROMPT, REAL_TOKENS, REAL_PAIRS
        ratios += [measure(REAL, rows, *given) for rows in REAL_ROWS]
    text = json.dumps({"load": os.getloadavg(), "ratios": ratios}, indent=2) + "\n"
    Path(__file__).with_suffix(".json").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
