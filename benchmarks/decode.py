"""Decode rates of localrl beside a bare loop on the same model, in turn in one process.

    python benchmarks/decode.py                      # the 7.3 M random Qwen3 of peers/make_model.py
    python benchmarks/decode.py --rows 1,4,16,64 --tokens 2048 --plot

The bare loop is the least that samples from a model with mlx-lm: prefill, copy the cache, then
`model(tokens)` and `mx.random.categorical`, one call for each token, with no log-probability, no
entropy and no end. Prints one JSON object. --plot draws localrl's time over rows and length
instead, from one run of each number of rows, without the loop.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from localrl.backend import mx
from localrl.diagnostics.bench import BenchRequest, Opened, decode_once, open_bench
from localrl.diagnostics.bench_fit import Fit, fit
from localrl.engines.mlx import decode
from localrl.engines.mlx.network import open_network

HERE = Path(__file__).resolve().parent
PICTURE = HERE.parent / "docs" / "decode.png"


def bare(opened: Opened, rows: int) -> np.ndarray:
    """(tokens - 1,) seconds of each token after the first."""
    policy = opened.policy
    prefilled = decode.prefill(
        open_network(policy.model), np.array([opened.prompt]), [len(opened.prompt)]
    )
    state = prefilled.fork(np.zeros(rows, int), None)
    cache, tokens = state.cache, mx.random.categorical(state.next)
    mx.eval(tokens)
    marks = [time.perf_counter()]
    for _ in range(opened.request.tokens - 1):
        logits = policy.model(tokens[:, None], cache=cache)[:, -1]
        tokens = mx.random.categorical(logits)
        mx.eval(tokens)
        marks.append(time.perf_counter())
    return np.diff(marks)


def compare(opened: Opened) -> tuple[list[dict[str, Any]], dict[int, np.ndarray]]:
    """Rates of both at each number of rows, taking turns; and localrl's seconds of each token."""
    found, steps = [], {}
    for rows in opened.request.rows:
        decode_once(opened, rows)
        bare(opened, rows)
        ours, theirs = [], []
        for _ in range(opened.request.repeats):
            ours.append(decode_once(opened, rows)[1:])
            theirs.append(bare(opened, rows))
        steps[rows] = np.median(ours, axis=0)
        mean, other = (median(run.mean() for run in runs) for runs in (ours, theirs))
        found.append(
            {
                "rows": rows,
                "tokens_per_s": rows / mean,
                "bare_tokens_per_s": rows / other,
                "ratio": other / mean,
            }
        )
    return found, steps


def alone(opened: Opened) -> dict[int, np.ndarray]:
    """localrl's seconds of each token, once for each number of rows."""
    return {rows: decode_once(opened, rows)[1:] for rows in opened.request.rows}


def draw(steps: dict[int, np.ndarray], fitted: Fit, prompt: int) -> None:
    """Milliseconds of a token over its place, measured and fitted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), constrained_layout=True)
    for n, (rows, seconds) in enumerate(steps.items()):
        places = np.arange(len(seconds)) + prompt + 1
        size = max(1, len(seconds) // 64)
        cut = len(seconds) // size * size
        smooth = 1e3 * seconds[:cut].reshape(-1, size).mean(axis=1)
        axes.plot(
            places[:cut:size], smooth, color=f"C{n}", label=f"{rows} row{'s' if rows > 1 else ''}"
        )
        line = fitted.a_ms + fitted.b_ms * rows + (fitted.c_ms or 0.0) * rows * places
        axes.plot(places, line, color=f"C{n}", linestyle=":")
    axes.set(
        xlabel="tokens before it", ylabel="milliseconds for one token of every row", ylim=(0, None)
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=110)


@click.command(help=__doc__)
@click.option("--rows", default="1,2,4,8,16", show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--prompt-tokens", default=20, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--plot", is_flag=True, help="Draw docs/decode.png.")
def main(rows: str, tokens: int, prompt_tokens: int, repeats: int, plot: bool) -> None:
    """Measure both."""
    counts = tuple(map(int, rows.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(HERE / "peers" / "make_model.py"), folder], check=True)
        request = BenchRequest(counts, prompt_tokens, tokens, repeats)
        opened = open_bench(f"{folder}/model", 0, request)
        found, steps = ([], alone(opened)) if plot else compare(opened)
    fitted = fit(steps, prompt_tokens)
    if plot and fitted:
        draw(steps, fitted, prompt_tokens)
    told = {"load": os.getloadavg(), "rates": found, "fit": vars(fitted) if fitted else None}
    click.echo(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
