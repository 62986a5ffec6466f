"""SmolLM2-135M under limits of memory: what was predicted, what was taken, what gave way.

    python benchmarks/memory_real.py        writes benchmarks/memory_real.json; ten minutes

Two steps of 8 prompts x 4 completions of 24 tokens, without a limit, and then under limits that are
shares of what that took. A limit that nothing fits under is refused before weights are loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHARES = (1.3, 1.0, 0.5, 0.25)
LIMIT_S = 1800
CODE = """
import json, sys
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
    plan = vars(found.plan)
    print(json.dumps({"peak_bytes": found.peak_bytes, "plan": plan, "told": told.lines}))
"""
SETTINGS = {
    "model.path": "smollm2-135m",
    "task.name": "extraction:1",
    "task.eval_prompts": 0,
    "rollout.prompts_per_step": 8,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 24,
    "learning.kappa": 4.0,  # every completion teaches something: the step at its worst
    "run.steps": 2,
}


def run(limit: int | None) -> dict[str, Any]:
    """What a run under a limit in bytes came to."""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {**SETTINGS, "run.out": f"{folder}/run"}
        if limit is not None:
            settings |= {"memory.limit": f"{limit // 10**6}MB", "memory.recalibrate": True}
        done = subprocess.run(
            [sys.executable, "-c", CODE, json.dumps(settings)],
            check=True, capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
    return {"limit_bytes": limit, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Measure, write and print."""
    runs = [run(None)]
    whole = runs[0]["peak_bytes"]
    runs += [run(int(share * whole)) for share in SHARES]
    Path(__file__).with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n")
    for one in runs:
        print({key: value for key, value in one.items() if key != "plan"})
        print({key: value for key, value in one.get("plan", {}).items() if key != "reason"})


if __name__ == "__main__":
    main()
