"""SmolLM2-135M in 16 bits and with TF32, rounded as Metal rounds (tests/emulation.py)."""

from __future__ import annotations

import gc
import json

import pytest
import tiny
from emulation import LIMITS, metal

from localrl.backend import mx
from localrl.config import RunConfig
from localrl.engines.choose import choose_engine
from localrl.engines.open import make_policy
from localrl.policy.model import load_model
from localrl.runs.logs import read_jsonl
from localrl.train import train
from localrl.training.session import NullProgress

VARIED = (
    "def varied(completion_ids):\n    return [sum(ids) % 997 / 996 for ids in completion_ids]\n"
)
STORIES = ("a ship", "a king", "a dog", "a city")
GAPS = {"bf16": (0.01, 0.1), "fp16": (0.001, 0.01)}
"""Mean difference in nats between sampler and update: at least and at most."""


class Listener(NullProgress):
    """Keeps what a run warns of."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, line: str) -> None:
        self.told.append(line)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("task")
    (place / "varied.py").write_text(VARIED)
    rows = [{"prompt": f"Tell me about {what}."} for what in STORIES]
    (place / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def config(folder, place, out, dtype):
    return RunConfig.create(
        {
            "model.path": str(folder),
            "model.engine": "mlx",
            "model.dtype": dtype,
            "memory.dequantise": "off",
            "task.name": str(place / "stories.jsonl"),
            "task.rewards": f"{place / 'varied.py'}:varied",
            "task.eval_prompts": 2,
            "lora.rank": 4,
            "lora.layers": 8,
            "rollout.prompts_per_step": 2,
            "rollout.group_size": 4,
            "rollout.max_completion_tokens": 8,
            "learning.lr": 1e-4,
            "learning.warmup_steps": 0,
            "run.steps": 2,
            "run.out": str(out),
        }
    )


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_it_begins_trains_and_evaluates_without_an_untrue_warning(
    folder, place, tmp_path, dtype, limit
):
    gc.collect()
    listener = Listener()
    with metal(limit=limit):
        result = train(config(folder, place, tmp_path / "run", dtype), progress=listener)
    assert listener.told == []
    steps = [s for s in read_jsonl(result.folder / "metrics.jsonl") if "update/applied" in s]
    assert [step["update/applied"] for step in steps] == [True, True]
    least, most = GAPS[dtype]
    for step in steps:
        assert least < step["sampling/sampling_logp_difference/mean"] < most
    events = list(read_jsonl(result.folder / "events.jsonl"))
    checks = [c for e in events if e["kind"] == "selfcheck" for c in e["checks"]]
    assert {c["verdict"] for c in checks} == {"ok"}
    values = {c["name"]: c["value"] for c in checks}
    print(dtype, limit, values, [s["sampling/sampling_logp_difference/mean"] for s in steps])
    assert values["padded_prompts"] < 1e-4
    assert values["forest_mean"] < 1e-4
    assert json.loads((result.folder / "eval.json").read_text())["n"] > 0


def test_a_policy_that_does_not_move_is_not_taken_for_one_that_does(folder, place, tmp_path):
    """At a learning rate of 0, in bfloat16: nothing is clipped, nothing drifts, most is reused."""
    gc.collect()
    settings = {
        "learning.objective": "gspo",
        "learning.lr": 0.0,
        "learning.updates_per_step": 2,
        "rollout.prompts_per_step": len(STORIES),  # all of them come again in the second step
        "rollout.group_size": 4,
        "rollout.reuse": 1.0,
        "task.eval_prompts": 0,
    }
    wish = config(folder, place, tmp_path / "run", "bf16")
    for key, value in settings.items():
        wish = wish.replace(key, value)
    with metal(limit=LIMITS[0]):
        result = train(wish)
    steps = [s for s in read_jsonl(result.folder / "metrics.jsonl") if "update/applied" in s]
    for step in steps:
        assert step["clip_ratio/low_mean"] + step["clip_ratio/high_mean"] < 0.01
        assert step["update/drift"] == 0
    # gspo's range is 3e-4 and 4e-4; sampler and update are hundredths of a nat apart.
    assert steps[0]["sampling/sampling_logp_difference/mean"] > 0.01
    # Three completions of each prompt, of 8 tokens. Passes of other shapes round otherwise, so a
    # few are refused; with the sampler's record as the measure a third of the tokens would be.
    assert steps[1]["rollout/reused_tokens"] > 0.7 * len(STORIES) * 3 * 8


def test_tf32_stays_below_the_limits(folder):
    gc.collect()
    with metal(tf32=True):
        policy = make_policy(
            load_model(folder), rank=4, scale=2.0, seed=0, for_cpu=True, dense=False, layers=2
        )
        tiny.stir(policy.model, 0, 0.02)
        policy = choose_engine(policy, "mlx")
    values = {check.name: check.value for check in policy.checks}
    assert {check.verdict for check in policy.checks} == {"ok"}
    assert values["padded_prompts"] > 1e-4
    assert policy.engine.shares_prompts
    assert mx.float32 == policy.model.model.norm.weight.dtype
