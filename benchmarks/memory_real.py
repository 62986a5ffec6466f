"""Two models under limits: what was predicted, what MLX and the process took, what gave way.

    python benchmarks/memory_real.py [--model PATH]     writes benchmarks/memory_real.json

Two steps of SmolLM2-135M (8 prompts x 4 completions of 24 tokens) and four of the embedded model,
without a limit, and then under limits that are shares of what the process held at its peak without
one. A limit that nothing fits under is refused before weights are loaded; the least that a refusal
names is tried too. Goes on where the file ends. The process's peak is `ru_maxrss`, on a Mac
not the footprint that the limit is compared with.
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

SHARES = ("none", "1.3", "1.0", "0.5", "least")
LIMIT_S = 1800
CODE = """
import json, resource, sys
from localrl import RunConfig, train
from localrl.errors import MemoryBudgetError
settings = json.loads(sys.argv[1])
from localrl.training.session import NullProgress
class Told(NullProgress):
    def __init__(self): self.lines = []
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


def main() -> None:
    """Measure what the file does not hold yet, and print it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMOLLM2["model.path"], help="SmolLM2-135M-Instruct")
    smollm2 = {**SMOLLM2, "model.path": parser.parse_args().model}
    file = Path(__file__).with_suffix(".json")
    found: dict[str, dict[str, Any]] = json.loads(file.read_bytes()) if file.exists() else {}
    for model, settings in {"embedded": EMBEDDED, "SmolLM2-135M": smollm2}.items():
        runs = found.setdefault(model, {})
        for share in SHARES:
            if share not in runs:
                runs[share] = run(settings, _limit(share, runs, settings))
                file.write_text(json.dumps(found, indent=1) + "\n")
    for model, runs in found.items():
        for share, one in runs.items():
            print(model, share, {key: value for key, value in one.items() if key != "plan"})
            print({key: value for key, value in one.get("plan", {}).items() if key != "reason"})


def _limit(share: str, runs: dict[str, dict[str, Any]], settings: dict[str, Any]) -> int | None:
    if share == "none":
        return None
    if share != "least":
        return int(float(share) * runs["none"]["process_bytes"])
    named = re.search(r"--memory-limit (\d+)MB", run(settings, 10**6)["refused"])
    assert named
    return int(named[1]) * 10**6


if __name__ == "__main__":
    main()
