"""Rope settings that mlx-lm would silently ignore.

transformers 5 writes them under `rope_parameters`; most mlx-lm families read `rope_theta` and
`rope_scaling`, and use a default without them: wrong logits and no error. The values are the same
under both names, so they are copied to where the family reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from localrl.errors import ConfigError

PLAIN = ("default", None)
COPIED = ("rope_theta", "partial_rotary_factor")
"""Keys that older configurations have at the top level."""


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to add to a config.json so that its rope settings are read; often nothing.

    Raises: ConfigError if they cannot be put where the family reads them.
    """
    added = _level(config)
    text = config.get("text_config")
    if isinstance(text, dict):
        inner = _level(text)
        if inner:
            added["text_config"] = {**text, **inner}
    return added


def _level(config: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get("rope_parameters")
    known = _fields(config)
    if not isinstance(given, dict) or "rope_parameters" in known:
        return {}
    if any(isinstance(value, dict) for value in given.values()):
        wanted = _by_layer(config, given, known)
    else:
        wanted = _settings(given)
    added = {}
    for name, value in wanted.items():
        if known and name not in known:
            raise _refusal(config, f"its mlx-lm family does not read {name}")
        old = config.get(name)
        if old is None:
            added[name] = value
        elif name == "rope_theta" and float(old) != float(value):
            raise _refusal(config, f"it also has a different rope_theta {old}")
    return added


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert one set of rope settings to the older keys."""
    wanted = {name: given[name] for name in COPIED if name in given}
    if given.get("rope_type", given.get("type")) not in PLAIN:
        wanted["rope_scaling"] = {k: v for k, v in given.items() if k != "rope_theta"}
    return wanted


def _by_layer(
    config: Mapping[str, Any], given: Mapping[str, Any], known: set[str]
) -> dict[str, Any]:
    """Convert separate settings for full and sliding attention, as in Gemma 3."""
    full, sliding = given.get("full_attention"), given.get("sliding_attention")
    if not (isinstance(full, dict) and isinstance(sliding, dict)):
        raise _refusal(config, f"they are given for {', '.join(given)}")
    local = _settings(sliding)
    theta = local.pop("rope_theta", None)
    if local or theta is None or "rope_local_base_freq" not in known:
        raise _refusal(config, "its mlx-lm family has no such settings for sliding attention")
    return {**_settings(full), "rope_local_base_freq": theta}


def _fields(config: Mapping[str, Any]) -> set[str]:
    """Return the names that the family reads from its configuration; empty if it is unknown."""
    from mlx_lm.utils import _get_classes

    try:
        arguments = _get_classes(dict(config))[1]
    except (ValueError, KeyError, AttributeError, TypeError):
        return set()
    return {entry.name for entry in dataclasses.fields(arguments)}


def _refusal(config: Mapping[str, Any], reason: str) -> ConfigError:
    return ConfigError(
        f"The rope settings of this {config.get('model_type')} model are under rope_parameters "
        f"(transformers 5), and mlx-lm cannot read them: {reason}. Guessing would make the model "
        "silently wrong. Use a copy of the model converted for MLX."
    )
