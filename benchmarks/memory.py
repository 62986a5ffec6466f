"""Predicted against measured peaks of MLX's memory, for random models of several shapes.

    python benchmarks/memory.py            writes benchmarks/memory.md and memory.jsonl; goes on
                                           where memory.jsonl ends

Every row is a step at its worst: all prompts and completions as long as the plan allows, decoded by
the real decoder and learned from by the real update. "prior" is what `localrl plan` says before it
has measured anything, "calibrated" the same after the two short passes of the first run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from localrl.backend import mx, nn

HERE = Path(__file__).parent
MIB = 2**20
QWEN = {
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
WINDOWS = {"sliding_window": 64, "sliding_window_pattern": 3, "query_pre_attn_scalar": 32}
SMALL: dict[str, Any] = {**QWEN, "hidden_size": 256, "num_hidden_layers": 8,
    "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 4096}  # fmt: skip
DELTA = {"linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4}  # fmt: skip
MAMBA = {"layer_types": ["mamba", "mamba", "mamba", "attention"] * 2, "attention_bias": False,
    "embedding_multiplier": 6.0, "attention_multiplier": 0.125, "logits_scaling": 4.0,
    "residual_multiplier": 0.5, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_proj_bias": False,
    "mamba_d_state": 64, "mamba_d_conv": 4, "mamba_n_groups": 1,
    "mamba_conv_bias": True}  # fmt: skip
CONVOLUTIONS = {"layer_types": ["conv", "conv", "conv", "full_attention"] * 2, "norm_eps": 1e-6,
    "conv_bias": False, "conv_L_cache": 3, "block_dim": 256, "block_ff_dim": 768,
    "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False}  # fmt: skip
GEMMA4 = {"num_kv_shared_layers": 4, "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": 4096, "global_head_dim": 128, "sliding_window": 64,
    "sliding_window_pattern": 4, "final_logit_softcapping": 30.0, "pad_token_id": 0}  # fmt: skip
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "qwen3 1 M, tied": ({**QWEN, "hidden_size": 128, "num_hidden_layers": 4,
        "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 1024}, 0),
    "qwen3 8 M, untied": ({**QWEN, "hidden_size": 256, "num_hidden_layers": 8,
        "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 4096, "tie_word_embeddings": False}, 0),
    "llama 14 M, 4-bit": ({**QWEN, "model_type": "llama", "hidden_size": 256,
        "num_hidden_layers": 6, "intermediate_size": 1024, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 32000}, 4),
    "gemma3 17 M, windows": ({**QWEN, **WINDOWS, "model_type": "gemma3_text", "hidden_size": 256,
        "num_hidden_layers": 6, "intermediate_size": 1024, "num_attention_heads": 4,
        "num_key_value_heads": 1, "vocab_size": 50000, "head_dim": 64,
        "tie_word_embeddings": False}, 0),
    "qwen3_5 8 M": ({"model_type": "qwen3_5", "tie_word_embeddings": True,
        "text_config": {**SMALL, **DELTA, "model_type": "qwen3_5_text"}}, 0),
    "granitemoehybrid 8 M": ({**SMALL, **MAMBA, "model_type": "granitemoehybrid"}, 0),
    "lfm2 8 M": ({**SMALL, **CONVOLUTIONS, "model_type": "lfm2"}, 0),
    "gemma4_text 12 M": ({**SMALL, **GEMMA4, "model_type": "gemma4_text"}, 0),
}  # fmt: skip
RUNS: tuple[dict[str, Any], ...] = (
    {"group": 8, "prompt": 32, "length": 32},
    {"group": 16, "prompt": 64, "length": 64},
    {"group": 8, "prompt": 128, "length": 128, "micro": 4},
    {"group": 8, "prompt": 128, "length": 256, "micro": 4, "checkpoint": True},
    {"group": 2, "prompt": 32, "length": 512},
    {"group": 4, "prompt": 64, "length": 1024, "micro": 1},
)
"""Completions of a prompt, tokens, rows of a backward pass (0: all); two prompts a step."""
HYBRIDS: tuple[dict[str, Any], ...] = (
    {"group": 2, "prompt": 32, "length": 64},
    {"group": 8, "prompt": 64, "length": 64},
    {"group": 8, "prompt": 128, "length": 128, "micro": 4},
    {"group": 8, "prompt": 128, "length": 256, "micro": 4, "checkpoint": True},
    {"group": 2, "prompt": 256, "length": 256},
    {"group": 2, "prompt": 64, "length": 512, "micro": 1},
)
"""For families with recurrent layers and Gemma 4."""
QUANTISED: tuple[dict[str, Any], ...] = (
    {"group": 2, "prompt": 32, "length": 32},
    {"group": 4, "prompt": 64, "length": 64, "micro": 2},
)
"""Fewer of them where products are quantised: they take minutes on a CPU."""
PROMPTS = 2


class Endless:
    """A tokenizer whose completions never end."""

    end_ids: frozenset[int] = frozenset()

    def plain_tokens(self) -> tuple[int, ...]:
        return tuple(range(1, 17))

    def decode(self, ids: Any) -> str:
        return ""


def measure(name: str) -> list[dict[str, Any]]:
    """All rows of one shape, in this process."""
    # After localrl.backend, which chooses MLX's BLAS.
    from mlx_lm.utils import _get_classes

    from localrl.config import RunConfig
    from localrl.engines.choose import choose_engine
    from localrl.engines.open import make_policy
    from localrl.learning.update import Updater
    from localrl.memory.limit import Limit
    from localrl.memory.machine import resident_bytes
    from localrl.memory.plan import PlanRequest, initial_plan
    from localrl.memory.sizes import quantised, read_sizes
    from localrl.policy.model import LoadedModel
    from localrl.training.calibrate import measure as calibrate
    from localrl.training.memory_plan import _workload

    shape, bits = SHAPES[name]
    mx.random.seed(0)
    model_class, arguments = _get_classes(shape)
    model = model_class(arguments.from_dict(shape))
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    sizes = quantised(read_sizes({**shape, "dtype": "float32"}), bits)
    policy = make_policy(
        LoadedModel(model, Endless()),
        rank=16,
        scale=2.0,
        seed=0,
        for_cpu=True,
        dense=not bits,  # type: ignore[arg-type]
    )
    policy = choose_engine(policy)
    rows = []
    newer = name in list(SHAPES)[-4:]
    for run in QUANTISED if bits else HYBRIDS if newer else RUNS:
        config = RunConfig.create(
            {
                "model.path": "random",
                "rollout.group_size": run["group"],
                "rollout.prompts_per_step": PROMPTS,
                "rollout.max_prompt_tokens": run["prompt"],
                "rollout.max_completion_tokens": run["length"],
                "memory.micro_rows": run.get("micro", 0) or PROMPTS * run["group"],
                "memory.dequantise": "off" if bits else "auto",
                "task.eval_prompts": 0,
            }
        )
        plan = initial_plan(config, vocabulary=sizes.vocabulary, on_cpu=True, threads=None)
        plan = replace(plan, grad_checkpoint=run.get("checkpoint", False))
        workload = _workload(config, sizes, run["group"], "cpu", True, False)
        assert workload is not None
        request = PlanRequest(
            plan, sizes, {run["group"]: workload}, Limit(None, "", from_machine=False)
        )
        updater = Updater(policy, config.learning, 1.0)
        coefficients = calibrate(updater, request, plan)
        assert coefficients is not None
        peak = _step(policy, updater, plan)
        rows.append(
            {
                "shape": name,
                **run,
                "peak": peak,
                "prior": request.estimate(plan).peak,
                "calibrated": request.estimate(plan, coefficients).peak,
                "parts": vars(request.estimate(plan)),
                "b": coefficients.linear,
                "c": coefficients.quadratic,
                "weights": mx.get_active_memory(),
                "resident": resident_bytes(),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _step(policy: Any, updater: Any, plan: Any) -> dict[str, int]:
    """Peaks of decoding and of learning, all sequences at their longest."""
    import numpy as np

    from localrl.records import Batch, BatchNode
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
    ones = np.ones(length, np.float32)
    nodes = [
        BatchNode(
            s.tree, -1, s.token_ids.astype(np.int32), (-1) ** i * ones, s.logprobs, True, 0 * ones
        )
        for i, s in enumerate(segments)
    ]
    batch = Batch(tuple(prompts), tuple(nodes), float(PROMPTS * length))
    updater.shared = True
    updater.update(batch, plan)  # from here on the moments exist
    mx.clear_cache()
    mx.reset_peak_memory()
    updater.update(batch, plan)
    return {"rollout": rollout, "update": mx.get_peak_memory()}


def table(rows: list[dict[str, Any]]) -> str:
    """The page."""
    head = (
        "| model | group | prompt | completion | rows | recomputed | rollouts | update | prior | | "
        "calibrated | | b | c | process |\n|" + "---|" * 15 + "\n"
    )
    return head + "".join(f"| {' | '.join(map(str, _cells(row)))} |\n" for row in rows)


def _cells(row: dict[str, Any]) -> list[object]:
    peak = max(row["peak"].values())
    cells: list[object] = [row["shape"], row["group"], row["prompt"], row["length"]]
    cells += [row.get("micro") or PROMPTS * row["group"], "yes" if row.get("checkpoint") else ""]
    cells += [f"{row['peak'][phase] / MIB:.0f}" for phase in ("rollout", "update")]
    for kind in ("prior", "calibrated"):
        cells += [f"{row[kind] / MIB:.0f}", f"{100 * (row[kind] / peak - 1):+.0f} %"]
    return [*cells, f"{row['b']:.2f}", f"{row['c']:.2f}", f"{row['resident'] / MIB:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--table", action="store_true", help="only write the page again")
    request = parser.parse_args()
    if request.shape:
        measure(request.shape)
        return
    log = HERE / "memory.jsonl"
    if not request.table:
        lines = log.read_bytes().splitlines() if log.exists() else []
        done = {json.loads(line)["shape"] for line in lines}
        for shape in [name for name in SHAPES if name not in done]:
            command = [sys.executable, __file__, "--shape", shape]
            lines += subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()
            log.write_bytes(b"\n".join(lines) + b"\n")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    page = HERE / "memory.md"
    before, _, rest = page.read_text().partition("| model |")
    page.write_text(before + table(rows) + "\n" + rest.partition("\n\n")[2])


if __name__ == "__main__":
    main()
