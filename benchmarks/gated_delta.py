"""Memory and time of one gated delta layer's gradient: over chunks, and in mlx-lm's loop.

    python benchmarks/gated_delta.py > benchmarks/gated_delta.json

One row, 16 heads of keys and 32 of values, 128 numbers each, as in Qwen3.5-9B. Each measurement is
a process of its own; memory is MLX's peak above what is there before. Prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from localrl.backend import mx
from localrl.engines.mlx.gated_delta import gated_delta

LENGTHS = (256, 512, 1024)
KEYS, VALUES, SIZE = 16, 32, 128


def measure(kind: str, tokens: int) -> dict[str, Any]:
    """Peak bytes and seconds of one gradient of a sum."""
    from mlx_lm.models.gated_delta import gated_delta_ops

    q, k = (mx.random.normal((1, tokens, KEYS, SIZE)) / SIZE**0.5 for _ in "qk")
    v = mx.random.normal((1, tokens, VALUES, SIZE))
    log_g = -mx.random.uniform(0, 1, (1, tokens, VALUES))
    beta = mx.sigmoid(mx.random.normal((1, tokens, VALUES)))
    state = mx.zeros((1, VALUES, SIZE, SIZE))

    def loop(*given: mx.array) -> mx.array:
        q, k, v, log_g, beta = given
        return gated_delta_ops(q, k, v, mx.exp(log_g), beta, state)[0]

    def chunks(*given: mx.array) -> mx.array:
        return gated_delta(*given, state)[0]

    function = loop if kind == "loop" else chunks
    given = q, k, v, log_g, beta
    mx.eval(given, state)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(mx.grad(lambda *given: function(*given).sum(), argnums=range(5))(*given))
    return {
        "kind": kind,
        "tokens": tokens,
        "peak_bytes": mx.get_peak_memory() - before,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Measure both at every length, in turn."""
    found = []
    for tokens in LENGTHS:
        for kind in ("chunks", "loop"):
            command = [sys.executable, __file__, kind, str(tokens)]
            told = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(told.stdout))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
