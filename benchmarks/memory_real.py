"""Two models under limits: what was predicted, what MLX and the process took, what gave way.

    python benchmarks/memory_real.py [--model PATH]     writes benchmarks/memory_real.json

Two steps of SmolLM2-135M (8 prompts x 4 completions of 24 tokens) and four of the embedded model,
without a limit, and then under limits that are shares of what the process held at its peak without
one. A limit that nothing fits under is refused before weights are loaded, and the limit that the
refusal names is tried. The process's peak is `ru_maxrss`; on a Mac that is not the footprint.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHARES = (1.3, 1.0, 0.5)
LIMIT_S = 1800
CODE = """
import json, resource, sys
from localrl import RunConfig, train
from localrl.errors import MemoryBudgetError
settings = json.loads(sys.argv[1])
class Told:
    def __init__(self): self.lines = []
    def begin(self, session): pass
    def evaluated(self, step, evaluation): pass
    def stepped(self, metrics): pass
    def warn(self, line): self.lines.append(line)
told = Told()
try:
    found = train(RunConfig.create(settings), progress=told)
except MemoryBudgetError as error:
    print(json.dumps({"refused": str(error)}))
else:
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({
        "peak_bytes": found.peak_bytes,
        "process_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "plan": vars(found.plan),
        "told": told.lines,
    }))
"""
SMOLLM2 = {
    "model.path": "smollm2-135m",
    "task.name": "extraction:1",
    "task.eval_prompts": 0,
    "rollout.prompts_per_step": 8,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 24,
    "learning.kappa": 4.0,  # every completion teaches something: the step at its worst
    "run.steps": 2,
}
EMBEDDED = {"task.eval_prompts": 0, "run.steps": 4}


def run(settings: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """What a run under a limit in bytes came to."""
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Any] = {"run.out": f"{folder}/run"}
        if limit is not None:
            changes |= {"memory.limit": f"{limit // 10**6}MB", "memory.recalibrate": True}
        done = subprocess.run(
            [sys.executable, "-c", CODE, json.dumps({**settings, **changes})],
            check=True, capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
    return {"limit_bytes": limit, **json.loads(done.stdout.splitlines()[-1])}


def under_limits(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of one model: without a limit, under shares of its peak, under the least limit."""
    runs = [run(settings, None)]
    whole = runs[0]["process_bytes"]
    for share in SHARES:
        runs.append({"share": share, **run(settings, int(share * whole))})
        print(runs[-1], flush=True)
    named = run(settings, 10**6)["refused"]
    found = re.search(r"--memory-limit (\d+)MB", named)
    assert found, named
    runs.append({"named": True, **run(settings, int(found[1]) * 10**6)})
    return runs


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMOLLM2["model.path"], help="SmolLM2-135M-Instruct")
    smollm2 = {**SMOLLM2, "model.path": parser.parse_args().model}
    found = {"embedded model": under_limits(EMBEDDED), "SmolLM2-135M": under_limits(smollm2)}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    for name, runs in found.items():
        for one in runs:
            print(name, {key: value for key, value in one.items() if key != "plan"})
            print({key: value for key, value in one.get("plan", {}).items() if key != "reason"})


if __name__ == "__main__":
    main()
