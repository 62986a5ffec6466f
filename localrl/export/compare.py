"""Comparison of greedy answers by the base with its adapter and by the fused model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from localrl.backend import mx
from localrl.engines.open import make_policy
from localrl.export.adapters import Adapter
from localrl.policy.model import load_model
from localrl.policy.precision import to_float32

Prompt = tuple[int, ...]


def greedy_pairs(
    adapter: Adapter,
    model_folder: Path,
    fused_folder: Path,
    prompts: Sequence[Prompt],
    *,
    most: int,
    base_bits: int,
    on_cpu: bool,
) -> Iterator[tuple[str, str]]:
    """Yield each prompt's greedy text by the base with its adapter and by the fused model.

    most: maximum tokens of a text. base_bits: see `export_fused`. on_cpu: compute in float32 from
    the values as stored, because narrower formats are many times slower there.
    """
    loaded = load_model(model_folder, quantize=base_bits)
    policy = make_policy(
        loaded,
        rank=adapter.rank,
        scale=adapter.scale,
        seed=0,
        for_cpu=on_cpu,
        dense=False,
        layers=adapter.layers_of(len(loaded.model.layers)),
        keys=adapter.keys,
        weights=adapter.weights,
        source=model_folder,
    )
    fused, tokenizer = load_model(fused_folder).model, loaded.tokenizer
    if on_cpu:
        to_float32(fused)
    for prompt in prompts:
        both = [greedy(model, prompt, most, tokenizer.end_ids) for model in (policy.model, fused)]
        yield tokenizer.decode(both[0]), tokenizer.decode(both[1])


def greedy(model: Any, prompt: Prompt, most: int, ends: frozenset[int]) -> list[int]:
    """Decode greedily up to an end token or `most` tokens."""
    from mlx_lm.models.cache import make_prompt_cache

    cache, tokens, rest = make_prompt_cache(model), [], list(prompt)
    while len(tokens) < most:
        logits = model(mx.array([rest]), cache=cache)[0, -1]
        best: Any = mx.argmax(logits).item()
        if best in ends:
            break
        tokens.append(best)
        rest = [best]
    return tokens
