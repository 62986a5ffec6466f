"""A model folder whose next token depends on the last one alone: a real model that obeys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import tiny

from localrl.backend import mx

ZERO = ("o_proj.weight", "down_proj.weight")


def make_bigrams(
    folder: Path, follows: Mapping[str, str], *, template: str, extra: Sequence[str]
) -> Path:
    """A tiny model that writes `follows[token]` after each token, and its end token after others.

    The blocks add nothing, embeddings are the axes, and the head turns each axis into another.
    """
    tiny.make_folder(
        folder, bits=None, template=template, extra=extra, tie_word_embeddings=False, head_dim=16
    )
    file = folder / "model.safetensors"
    weights = dict(mx.load(str(file)))
    ids = {token: i for i, token in enumerate([*tiny.SPECIAL, *tiny.CHARACTERS, *extra])}
    size = tiny.CONFIG["vocab_size"]
    nexts = [ids["<end>"]] * size
    for token, then in follows.items():
        nexts[ids[token]] = ids[then]
    for name, array in weights.items():
        if name.endswith(ZERO):
            weights[name] = mx.zeros_like(array)
        elif name.endswith("embed_tokens.weight"):
            weights[name] = mx.eye(size)
        elif name == "lm_head.weight":
            weights[name] = 4 * mx.eye(size)[mx.array(nexts)].T
    mx.save_safetensors(str(file), weights)
    return folder
