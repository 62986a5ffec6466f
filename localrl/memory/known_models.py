"""Sizes of well-known models by Hub name, for plans of models that are not on this machine."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localrl.utils.packaged import PACKAGED_MODELS

CONVERTED = "mlx-community"
"""Owner that publishes models under their original names, converted and quantised by mlx-lm."""

GROUP_SIZE = 64
"""Default quantisation group size of mlx-lm's conversions."""

_CONVERSION = re.compile(r"(.+)-(?:([2-8])bit|bf16|fp16)", re.IGNORECASE)


def known_names() -> list[str]:
    """Return the names of all known models."""
    return list(_shapes())


def find_known(name: str) -> Mapping[str, Any] | None:
    """Return the size settings from the config.json of that model; None if it is not known.

    name: as on the Hub, with or without its owner, e.g. Qwen/Qwen3-0.6B, or as on mlx-community,
    ending in -4bit, -8bit, -bf16 or similar; case-insensitive. Or the `--model` name of a model
    that ships in a package.
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
    # The Hub has Llama 3.1 under two names; its conversions use the older one.
    requested = model.lower().removeprefix("meta-")
    for name, shape in _shapes().items():
        its_owner, _, its_model = name.lower().rpartition("/")
        if its_model == requested and owner.lower() in ("", its_owner):
            return shape
    return None
