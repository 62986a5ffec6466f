"""The number formats of stored weights: what a config.json says, and what mlx-lm makes of it.

mlx-lm's own folders name a format in `quantization`, and matrices that differ beside it. Folders of
other tools have a `quantization_config` with a `quant_method`. mlx-lm reads some of these methods,
some only in the families whose code handles their tensors, and passes over the rest, which ends in
an error about tensors. Here they are named before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from localrl.errors import ConfigError

MODES = {"affine": (4, 64), "mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
"""MLX's modes, with the bits and the group size of a matrix that does not name its own."""
PACKED = {
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "pack-quantized": "affine",
}
"""Formats of compressed-tensors that mlx-lm reads, in groups of 32, or 16 for nvfp4."""
TENSORS = {
    "mxfp4": "_blocks",
    "fp8": "weight_scale_inv",
    "compressed-tensors": "weight_packed",
    "modelopt": "weight_scale",
}
"""A part of the names of a method's tensors: mlx-lm's families that handle them contain it."""
FLOATS = ("F32", "F16", "BF16")
"""Formats of safetensors whose numbers MLX computes with as they are."""
LOADED = (
    *FLOATS,
    "F8_E4M3",
    "F8_E8M0",
    "BOOL",
    "C64",
    *(f"{k}{n}" for k in "UI" for n in (8, 16, 32, 64)),
)
"""All formats that MLX loads: those of 8-bit floats as bytes."""
MATRICES = ("weight", "_proj", "_packed", "_blocks")
"""Ends of the names of matrices; other tensors may be positions and masks, which are not floats."""
WAY_OUT = (
    "Take the model in 16 bits, which --quantize 4 quantises when it is loaded, or a conversion of "
    "it for MLX."
)


@dataclass(frozen=True)
class StoredFormat:
    """The format of a model's matrices, where they do not name their own."""

    bits: int = 0
    """Bits of a weight; 0: floats."""
    group_size: int = 64
    mode: str = "affine"
    within_blocks: bool = False
    """True for other tools' files, which leave embedding, head and routers as floats."""


def stored_format(config: Mapping[str, Any]) -> StoredFormat:
    """Return the format that a config.json names.

    Raises: ConfigError for a method that mlx-lm does not read, in general or in this family.
    """
    if config.get("quantize_activations"):
        raise ConfigError(
            "The config.json has quantize_activations: such layers have no gradient for adapters. "
            "Set it to false; the weights stay as they are."
        )
    foreign = _foreign_settings(config)
    if settings := config.get("quantization"):
        if not isinstance(settings, Mapping):
            raise ConfigError(f"The config.json has an impossible quantization: {settings!r:.80}.")
        for own in settings.values():
            if isinstance(own, Mapping):
                named_format(own)
        return named_format(settings)
    return _foreign(config, foreign) if foreign else StoredFormat()


def check_stored(config: Mapping[str, Any], tensors: Mapping[str, str]) -> None:
    """Check that every matrix is stored as floats, or in a format that the config.json names.

    MLX loads bytes as integers and computes with them as if they were the weights.

    tensors: number formats by name, as safetensors calls them.

    Raises: ConfigError for a matrix that nothing explains, or a format that MLX cannot load.
    """
    unread = [name for name, kind in tensors.items() if kind not in LOADED]
    if unread:
        raise ConfigError(
            f"The tensor {unread[0]} is stored as {tensors[unread[0]]}{_more(unread)}, which MLX "
            f"cannot load. {WAY_OUT}"
        )
    if not config.get("quantization") and _foreign_settings(config):
        return  # mlx-lm reads this method in this family, see `stored_format`
    packed = [name for name, kind in tensors.items() if _is_packed(name, kind)]
    scaled = {
        n for n in packed if tensors[n] == "U32" and f"{n.rpartition('.')[0]}.scales" in tensors
    }
    lacking = [name for name in packed if name not in scaled]
    if lacking:
        kind = tensors[lacking[0]]
        raise ConfigError(
            f"The matrix {lacking[0]} is stored as {kind}{_more(lacking)}, which is neither floats "
            f"nor a quantisation that config.json names. {WAY_OUT}"
        )
    if scaled and not config.get("quantization"):
        raise ConfigError(
            f"The matrix {min(scaled)} is stored quantised{_more(scaled)}, but config.json has no "
            "quantization that says how. Take config.json from where the model comes from."
        )


def named_format(settings: Mapping[str, Any]) -> StoredFormat:
    """Return the format that mlx-lm's settings of a model, or of one matrix, name.

    Raises: ConfigError for an unknown mode or an impossible number.
    """
    mode = settings.get("mode", "affine")
    if mode not in MODES:
        raise ConfigError(
            f"The config.json has the quantization mode {mode!r:.80}; MLX has {', '.join(MODES)}. "
            "Upgrade localrl and mlx if the model is newer than they are."
        )
    bits, group_size = MODES[mode]
    found = settings.get("bits", bits), settings.get("group_size", group_size)
    return StoredFormat(_count("bits", found[0]), _count("group_size", found[1]), mode)


def _foreign_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return another tool's settings, of the model or of its text part; None if there are none.

    Raises: ConfigError for what is no table of settings.
    """
    inner = config.get("text_config")
    settings = config.get("quantization_config")
    if settings is None and isinstance(inner, Mapping):
        settings = inner.get("quantization_config")
    if settings and not isinstance(settings, Mapping):
        raise ConfigError(
            f"The config.json has an impossible quantization_config: {settings!r:.80}."
        )
    return settings or None


def _is_packed(name: str, kind: str) -> bool:
    last = name.rpartition(".")[2]
    eight = kind.startswith("F8") and "scale" not in last
    return kind not in FLOATS and (eight or last.endswith(MATRICES))


def _more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _foreign(config: Mapping[str, Any], settings: Mapping[str, Any]) -> StoredFormat:
    """The format that mlx-lm makes of another tool's method."""
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # whose older files do not name it
    if isinstance(method, str) and method in TENSORS:
        _check_family(config, method)
    blocks = settings.get("weight_block_size")
    if method == "fp8" and settings.get("scale_fmt") == "ue8m0" and blocks == [32, 32]:
        method = "mxfp8"
    if method == "fp8":
        return StoredFormat()  # the families that read it make floats of it
    if method in ("mxfp4", "mxfp8"):
        bits, group_size = MODES[method]
        return StoredFormat(bits, group_size, method, within_blocks=True)
    if method == "compressed-tensors" and settings.get("format") in PACKED:
        mode = PACKED[settings["format"]]
        return StoredFormat(4, 16 if mode == "nvfp4" else 32, mode, within_blocks=True)
    if method == "modelopt":
        inner = settings.get("quantization", settings)
        if isinstance(inner, Mapping) and inner.get("quant_algo") == "NVFP4":
            group_size = _count("group_size", inner.get("group_size", 16))
            return StoredFormat(4, group_size, "nvfp4", within_blocks=True)
    kind = settings.get("version") or "gemm"
    if method == "awq" and settings.get("bits", 4) == 4 and str(kind).lower() == "gemm":
        group_size = _count("group_size", settings.get("group_size", 128))
        return StoredFormat(4, group_size, within_blocks=True)
    names = ("format", "quant_algo", "bits", "version")
    more = ", ".join(f"{name} {settings[name]!r:.40}" for name in names if name in settings)
    raise _unread(f"{method!r:.40}{f' ({more})' if more else ''}", "mlx-lm does not read")


def _check_family(config: Mapping[str, Any], method: str) -> None:
    """Check that mlx-lm's code of the family handles the method's tensors.

    A family without a file of its own is another one's, and is left to mlx-lm.

    Raises: ConfigError if it does not.
    """
    inner = config.get("text_config")
    parts = (config, inner if isinstance(inner, Mapping) else {})
    names = dict.fromkeys(str(p["model_type"]).lower() for p in parts if "model_type" in p)
    codes = [_code(name) for name in names]
    if not any(code is None or TENSORS[method] in code for code in codes):
        family = " and ".join(names)
        raise _unread(repr(method), f"this version of mlx-lm does not read for the family {family}")


def _code(family: str) -> str | None:
    """Return mlx-lm's code of a family; None if it has no file of that name."""
    found = find_spec("mlx_lm")
    if found is None or found.origin is None or not family.replace("-", "_").isidentifier():
        return None
    file = Path(found.origin).parent / "models" / f"{family}.py"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _unread(method: str, why: str) -> ConfigError:
    return ConfigError(f"The weights are stored with quant_method {method}, which {why}. {WAY_OUT}")


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise ConfigError(f"The config.json has an impossible quantization.{name}: {value!r:.80}.")
    return value
