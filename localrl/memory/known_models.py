"""Sizes of well-known models by their name on the Hub, for plans of what is not on this machine."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localrl.utils.packaged import PACKAGED_MODELS

CONVERTED = "mlx-community"
"""Who publishes models under their own names, converted and quantised by mlx-lm."""

GROUP_SIZE = 64
"""Of mlx-lm's conversions, unless another is asked for."""

_CONVERSION = re.compile(r"(.+)-(?:([2-8])bit|bf16|fp16)", re.IGNORECASE)


def known_names() -> list[str]:
    """Names of all known models."""
    return list(_shapes())


def find_known(name: str) -> Mapping[str, Any] | None:
    """What sizes follow from in the config.json of that model; None when it is not known.

    name: as on the Hub, with or without its owner: Qwen/Qwen3-0.6B, or as mlx-community has it,
    with -4bit, -8bit, -bf16 and the like at its end; letter case does not matter. Or as `--model`
    has it, of a model that a package ships.
    """
    if packaged := PACKAGED_MODELS.get(name):
        return {**_shapes()[packaged.base_id], "quantization": packaged.quantization}
    owner, _, model = name.rpartition("/")
    if shape := _find(owner, model):
        return shape
    conversion = _CONVERSION.fullmatch(model)
    if conversion is None or owner.lower() not in ("", CONVERTED):
        return None
    shape, bits = _find("", conversion[1]), conversion[2]
    if shape is None or bits is None:
        return shape
    return {**shape, "quantization": {"bits": int(bits), "group_size": GROUP_SIZE}}


@functools.cache
def _shapes() -> dict[str, dict[str, Any]]:
    return json.loads(Path(__file__).with_name("shapes.json").read_text())


def _find(owner: str, model: str) -> Mapping[str, Any] | None:
    # The Hub has Llama 3.1 under two names, and its conversions under the older one.
    requested = model.lower().removeprefix("meta-")
    for name, shape in _shapes().items():
        its_owner, _, its_model = name.lower().rpartition("/")
        if its_model == requested and owner.lower() in ("", its_owner):
            return shape
    return None
