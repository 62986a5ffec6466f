"""How the models in this folder are trained and written: supervised, on a CPU, for 4 bits.

In float32; the last part sees the weights as 4 bits will store them (straight-through gradient), so
that quantising costs nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from localrl.backend import mx, nn, optim  # first, since it prepares the process for MLX

# isort: split
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import _get_classes

QUANTIZATION: dict[str, Any] = {"group_size": 32, "bits": 4}
MUON_LR = 0.02
ADAMW_LR = 3e-3
WARMUP = 100
SEED = 0

Params = Any
"""A tree of arrays, as `nn.Module.parameters` returns it."""
Batch = tuple[mx.array, mx.array]
"""Tokens and loss mask of one step: (B, L) int32, (B, L - 1) float32 over targets."""


def to_batch(rows: Sequence[Sequence[tuple[Sequence[int], bool]]]) -> Batch:
    """Rows of pieces, each some tokens and whether they are learned, padded at the end."""
    width = max(sum(len(tokens) for tokens, _ in row) for row in rows)
    ids = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), np.float32)
    for row, pieces in enumerate(rows):
        end = 0
        for tokens, learned in pieces:
            start, end = end, end + len(tokens)
            ids[row, start:end] = tokens
            mask[row, start:end] = learned
    return mx.array(ids), mx.array(mask[:, 1:])


def as_stored(weight: mx.array) -> mx.array:
    """The weight as 4 bits will store it; its gradient passes straight through."""
    if weight.ndim != 2:
        return weight
    stored = mx.dequantize(*mx.quantize(mx.stop_gradient(weight), **QUANTIZATION), **QUANTIZATION)
    return weight + mx.stop_gradient(stored - weight)


def loss_fn(
    params: Params, model: nn.Module, quantised: bool, tokens: mx.array, mask: mx.array
) -> mx.array:
    """Mean cross-entropy per learned token, in nats."""
    model.update(tree_map(as_stored, params) if quantised else params)
    logits = model(tokens[:, :-1])  # (B, L-1, V)
    losses = nn.losses.cross_entropy(logits, tokens[:, 1:])
    return (losses * mask).sum() / mask.sum()


def schedule(peak: float, steps: int) -> Callable[[mx.array], mx.array]:
    """Linear warm-up to the peak, then half a cosine down to a hundredth of it."""
    warmup = optim.linear_schedule(1e-7, peak, WARMUP)
    decay = optim.cosine_decay(peak, steps - WARMUP, peak / 100)
    return optim.join_schedules([warmup, decay], [WARMUP])


def make_optimizer(steps: int) -> optim.Optimizer:
    """Muon (Jordan, 2024) for the matrices inside the layers, AdamW for embedding and norms."""
    muon = optim.Muon(schedule(MUON_LR, steps), weight_decay=0.0)
    adamw = optim.AdamW(schedule(ADAMW_LR, steps), betas=[0.9, 0.98], weight_decay=0.01)
    return optim.MultiOptimizer([muon, adamw], [lambda path, p: "layers" in path and p.ndim == 2])


def train(
    config: dict[str, Any],
    batch: Callable[[int], Batch],
    *,
    steps: int,
    quantised_steps: int,
    prepare: Callable[[Any], None] = lambda model: None,
    report_every: int = 100,
) -> Any:
    """Train from the seed; the result has float32 weights, made for `QUANTIZATION`.

    batch: tokens and mask of a step. quantised_steps: steps at the end that see the weights as 4
    bits store them. prepare: changes the model that training begins with.
    """
    mx.random.seed(SEED)
    family, arguments = _get_classes(config)
    model: Any = family(arguments.from_dict(config))
    prepare(model)
    optimizer = make_optimizer(steps)
    params = tree_map(lambda p: p.astype(mx.float32), model.parameters())
    started = time.monotonic()
    for step in range(steps):
        quantised = step >= steps - quantised_steps
        grad = mx.value_and_grad(partial(loss_fn, model=model, quantised=quantised))
        tokens, mask = batch(step)
        loss, grads = grad(params, tokens=tokens, mask=mask)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        params = optimizer.apply_gradients(grads, params)
        mx.eval(params, optimizer.state, loss)
        if step % report_every == 0 or step == steps - 1:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step:5d}  loss {loss.item():.4f}  {minutes:.1f} min", flush=True)
    model.update(params)
    return model


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_tokenizer_config(folder: Path, unknown: str, end: str, longest: int) -> None:
    """Write the part of a tokenizer that tokenizer.json does not hold."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "pad_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    write_json(folder / "tokenizer_config.json", config)


def write_model(model: Any, folder: Path, config: dict[str, Any]) -> None:
    """Quantise and write the weights and their configuration."""
    nn.quantize(model, **QUANTIZATION)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_json(folder / "config.json", config | {"quantization": QUANTIZATION})
    write_json(folder / "generation_config.json", {"eos_token_id": config["eos_token_id"]})


def put_in_place(made: Path, target: Path) -> None:
    """Move a finished folder to its place; what was there is kept under another name."""
    if made != target:
        if target.exists():
            target.rename(target.with_name(f"{target.name}.old-{int(time.time())}"))
        made.rename(target)
