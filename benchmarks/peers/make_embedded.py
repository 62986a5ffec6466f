"""The embedded model as transformers reads it, and the prompts of its task, in a folder.

    python benchmarks/peers/make_embedded.py FOLDER

FOLDER/model is dense, in float32, with the values of the 4-bit weights; FOLDER/steps.jsonl holds
the demonstration's training prompts.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from localrl.backend import mx, tree_flatten
from localrl.config import RunConfig
from localrl.embedded import embedded_model_path
from localrl.engines.open import make_policy
from localrl.policy.model import load_model
from localrl.tasks.builtin import load_task


def make(folder: Path) -> None:
    """Write model and prompts."""
    source, target = embedded_model_path(), folder / "model"
    shutil.copytree(source, target)
    policy = make_policy(
        load_model(source), rank=1, scale=1.0, seed=0, for_cpu=True, dense=True, layers=1
    )
    weights = {
        name.replace(".linear.", "."): array
        for name, array in tree_flatten(policy.model.parameters())
        if not name.endswith(("lora_a", "lora_b"))
    }
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization"]
    (target / "config.json").write_text(json.dumps(config, indent=1))
    _write_prompts(folder / "steps.jsonl")


def _write_prompts(path: Path) -> None:
    count = RunConfig.create().task.train_prompts
    task = load_task("steps", train_prompts=count)
    examples = [task.train(n) for n in range(count)]
    rows = [{"prompt": e.messages[-1]["content"], "answer": e.answer} for e in examples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
