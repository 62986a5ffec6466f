"""Predicted against measured peaks of MLX's memory, for random models of several shapes.

    python benchmarks/memory.py            measures what memory.jsonl lacks, writes memory.md
    python benchmarks/memory.py --table    only predicts again, by the formula as it is now

Every row is a step at its worst: all prompts and completions as long as the plan allows, decoded by
the real decoder and learned from by the real update. "prior" is what `localrl plan` says before it
has measured anything, "calibrated" the same after the two short passes of the first run. What is
measured is stored; what is predicted is computed anew for each table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from memory_shapes import FITTED, LARGE, OTHERS, SHAPES, Shape, Step

from localrl.backend import mx, nn  # before others: it chooses MLX's BLAS
from localrl.config import RunConfig
from localrl.memory.calibration import Probe, solve
from localrl.memory.limit import Limit
from localrl.memory.plan import PlanRequest, fit, initial_plan
from localrl.memory.sizes import quantised, read_sizes
from localrl.records import MemoryPlan
from localrl.training.calibrate import DIVISORS, probe, shorter
from localrl.training.memory_plan import _as_loaded, _workload

HERE = Path(__file__).parent
MIB = 2**20
PROMPTS = 2


class Endless:
    """A tokenizer whose completions never end."""

    end_ids: frozenset[int] = frozenset()

    def plain_tokens(self) -> tuple[int, ...]:
        return tuple(range(1, 17))

    def decode(self, ids: Any) -> str:
        return ""


def request_of(shape: Shape, step: Step) -> PlanRequest:
    """The memory request of a step."""
    stored = {} if shape.bits and shape.dtype != "auto" else {"dtype": "float32"}
    sizes = quantised(read_sizes({**shape.config, **stored}), shape.bits)
    config = RunConfig.create(
        {
            "model.path": "random",
            "model.engine": shape.engine,
            "model.dtype": shape.dtype,
            "rollout.group_size": step.group,
            "rollout.prompts_per_step": PROMPTS,
            "rollout.max_prompt_tokens": step.prompt,
            "rollout.max_completion_tokens": step.length,
            "memory.micro_rows": step.micro or PROMPTS * step.group,
            "memory.dequantise": "off" if shape.bits else "auto",
            "task.eval_prompts": 0,
        }
    )
    sizes = _as_loaded(sizes, 0, shape.dtype)
    plan = initial_plan(config, vocabulary=sizes.vocabulary, on_cpu=True, threads=None)
    plan = replace(plan, grad_checkpoint=step.checkpoint)
    workload = _workload(config, sizes, step.group, "cpu", True, False)
    assert workload is not None
    limit = int(step.limit.removesuffix("MiB") or 0) * MIB
    return PlanRequest(
        plan, sizes, {step.group: workload}, Limit(limit or None, "", from_machine=False)
    )


def measure(name: str, done: set[Step]) -> Iterator[dict[str, Any]]:
    """Measure the steps of one shape, in this process."""
    # After localrl.backend, which chooses MLX's BLAS.
    from mlx_lm.utils import _get_classes

    from localrl.engines.choose import choose_engine
    from localrl.engines.open import make_policy
    from localrl.learning.update import Updater
    from localrl.policy.model import LoadedModel

    shape = SHAPES[name]
    mx.random.seed(0)
    model_class, arguments = _get_classes(shape.config)
    model = model_class(arguments.from_dict(shape.config))
    if shape.bits:
        nn.quantize(model, group_size=64, bits=shape.bits)
    mx.eval(model.parameters())
    policy = make_policy(
        LoadedModel(model, Endless()),  # type: ignore[arg-type]
        rank=16,
        scale=2.0,
        seed=0,
        for_cpu=True,
        dense=not shape.bits,
        dtype=shape.dtype,
    )
    policy = choose_engine(policy, shape.engine)
    for step in shape.steps:
        if step in done:
            continue
        request = request_of(shape, step)
        plan = fit(request) if step.limit else request.plan
        updater = Updater(policy, RunConfig.create({"model.path": "random"}).learning, 1.0)
        probes = [probe(updater.gradient, request, shorter(plan, n)).peak_bytes for n in DIVISORS]
        peak = _peaks(policy, updater, plan)
        yield {"shape": name, "step": asdict(step), "plan": asdict(plan), "peak": peak,
            "probes": probes}  # fmt: skip


def _peaks(policy: Any, updater: Any, plan: MemoryPlan) -> dict[str, int]:
    """Peaks of decoding and of learning, all sequences at their longest."""
    import numpy as np

    from localrl.rollouts.batch import TreeRequest
    from localrl.rollouts.decode import Decoder

    ids = np.random.default_rng(0).integers(0, 1000, (PROMPTS, plan.max_prompt_tokens))
    prompts = [tuple(map(int, row)) for row in ids]
    group, length = plan.group_size, plan.max_completion_tokens
    decoder = Decoder(policy, 1.0, plan.decode_rows, prefill_rows=plan.prefill_rows)
    requests = [TreeRequest(i, (0, 1, str(i)), group, group, length) for i in range(PROMPTS)]
    mx.clear_cache()
    mx.reset_peak_memory()
    segments = decoder.decode(prompts, requests)
    rollout = mx.get_peak_memory()
    updater.gradient.shared = True
    updater.update(_batch(prompts, segments, 8), plan)  # from here on the moments exist
    mx.clear_cache()
    mx.reset_peak_memory()
    updater.update(_batch(prompts, segments, length), plan)
    return {"rollout": rollout, "update": mx.get_peak_memory()}


def _batch(prompts: list[tuple[int, ...]], segments: list[Any], length: int) -> Any:
    """A batch of these completions, of this many tokens at most."""
    import numpy as np

    from localrl.records import Batch, BatchNode

    nodes = []
    for i, s in enumerate(segments):
        tokens = s.token_ids[:length].astype(np.int32)
        ones = np.ones(len(tokens), np.float32)
        logprobs = s.logprobs[:length]
        nodes.append(BatchNode(s.tree, -1, tokens, (-1) ** i * ones, logprobs, True, 0 * ones))
    return Batch(tuple(prompts), tuple(nodes), float(len(prompts) * length))


def predict(row: dict[str, Any]) -> dict[str, Any]:
    """A measured row with its predictions by the present formula."""
    request = request_of(SHAPES[row["shape"]], Step(**row["step"]))
    plan = MemoryPlan(**row["plan"])
    short = [shorter(plan, n) for n in DIVISORS]
    found = solve(
        [Probe(request.estimate(s), p) for s, p in zip(short, row["probes"], strict=True)]
    )
    peak = max(row["peak"].values())
    prior = request.estimate(plan)
    calibrated = None if found is None or request.counted(plan) else request.estimate(plan, found)
    return {**row, "prior": prior, "calibrated": calibrated, "found": found,
        "errors": [(e.peak / peak - 1) if e else float("nan") for e in (prior, calibrated)],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """One table of the page."""
    head = (
        "| model | group | prompt | completion | rows | recomputed | rollouts | update | prior | | "
        "calibrated | | b | c | h |\n|" + "---|" * 15 + "\n"
    )
    return head + "".join(f"| {' | '.join(map(str, _cells(predict(row))))} |\n" for row in rows)


def _cells(row: dict[str, Any]) -> list[object]:
    plan = row["plan"]
    cells: list[object] = [row["shape"], plan["group_size"]]
    cells += [plan["max_prompt_tokens"], plan["max_completion_tokens"], plan["micro_rows"]]
    cells.append("yes" if plan["grad_checkpoint"] else "")
    cells += [f"{row['peak'][phase] / MIB:.0f}" for phase in ("rollout", "update")]
    for kind, error in zip(("prior", "calibrated"), row["errors"], strict=True):
        cells += [f"{row[kind].peak / MIB:.0f}", f"{100 * error:+.0f} %"] if row[kind] else ["", ""]
    found = row["found"] if row["calibrated"] else None
    if found is None:  # counted, or no factors explain the passes
        return [*cells, "", "", ""]
    return [*cells, *(f"{n:.2f}" for n in (found.linear, found.quadratic, found.head))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="measure one shape in this process")
    parser.add_argument("--table", action="store_true", help="only write the page again")
    request = parser.parse_args()
    log = HERE / "memory.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if request.shape:
        done = {Step(**row["step"]) for row in rows if row["shape"] == request.shape}
        for row in measure(request.shape, done):
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        return
    if not request.table:
        for shape in SHAPES:
            subprocess.run([sys.executable, __file__, "--shape", shape], check=True)
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """Write the tables into the page, between their headings and what follows."""
    page = HERE / "memory.md"
    text = page.read_text()
    for heading, shapes in (
        ("## Fitted", FITTED),
        ("## Second shapes", OTHERS),
        ("## Large vocabularies", LARGE),
    ):
        own = [row for shape in shapes for row in rows if row["shape"] == shape]
        before, _, rest = text.partition(heading)
        first, _, rest = rest.partition("| model |")
        text = before + heading + first + table(own) + "\n" + rest.partition("\n\n")[2]
    page.write_text(text)


if __name__ == "__main__":
    main()
