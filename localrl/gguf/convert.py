"""From a GGUF file to a folder in mlx-lm's layout, made once, in localrl's cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.backend import mx
from localrl.cache import cache_folder
from localrl.errors import ConfigError
from localrl.gguf.families import (
    ROPE_FACTORS,
    Family,
    find_family,
    is_norm,
    row_heads,
    tensor_names,
    to_halves,
    to_pairs,
)
from localrl.gguf.reader import GGUF, Tensor, read_gguf, refused
from localrl.gguf.settings import config_of
from localrl.gguf.tensors import GROUP, Converted, bits_of, convert, is_lossless
from localrl.gguf.tokenizer import read_tokenizer

RECORD = "gguf.json"
"""In a converted folder: which file it was made of."""
FORMAT = 1
"""Of converted folders, and in their names; one more when a file would become another folder."""
SHARD = 1 << 30
"""Bytes of one file of weights, about."""
SPARE_BYTES = 1 << 28
"""Of the disk, left free."""

MOST_LICENCE = 200
"""Characters of a licence's name."""
ABANDONED_S = 24 * 3600.0
"""After as long nobody is still converting."""

Tell = Callable[[str], None]


def as_folder(path: Path, tell: Tell) -> Path:
    """The folder that a GGUF file becomes; it is made when it is not there yet.

    A file that was converted before is recognised by its size and times, else by its SHA-256. What
    is made is complete or not there at all, and the file itself is only read.

    tell: gets a line when something is made, and one when numbers had to be rounded.

    Raises: ConfigError when the file cannot be read as a model, or the disk has no room.
    """
    stamp = _stamp(path)
    root = cache_folder() / "gguf"
    name = _name(path)
    for folder in sorted(root.glob(f"{name}-*")):
        if _record(folder).get("stamp") == stamp:
            return _checked(folder)
    file = read_gguf(path)
    family = find_family(file.get("general.architecture", str, ""))
    digest = _digest(path)
    folder = root / f"{name}-{digest[:16]}.{FORMAT}"
    record = {"sha256": digest, "stamp": stamp, "format": FORMAT}
    if _record(folder).get("sha256") != digest:
        _make(file, family, folder, record, tell)
    elif os.access(folder, os.W_OK):
        _write_json(folder / RECORD, {**_record(folder), "stamp": stamp})
    return _checked(folder)


def _checked(folder: Path) -> Path:
    """Raises: ConfigError when files of a converted folder are gone: a cache may be cleaned up."""
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != RECORD}
    lost = [name for name, size in _record(folder)["files"].items() if files.get(name) != size]
    if lost:
        raise ConfigError(
            f"{folder} is damaged: {', '.join(lost)} is not as it was made. Delete the folder, and "
            "it is made again."
        )
    return folder


def unpack(path: Path, folder: Path) -> None:
    """Convert a file into an empty folder, outside of the cache.

    Raises: ConfigError when it cannot be read as a model; OSError.
    """
    file = read_gguf(path)
    _fill(file, _plan(file, find_family(file.get("general.architecture", str, ""))), folder)


def _name(path: Path) -> str:
    """The file's name, as far as it can be a folder's."""
    return re.sub(r"[^\w.-]+", "_", path.stem if path.suffix.lower() == ".gguf" else path.name)[:80]


def _stamp(path: Path) -> list[int]:
    """What changes when a file is written: size, times, and which file it is."""
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino]


def _record(folder: Path) -> dict[str, Any]:
    """What a converted folder says of its file; empty when there is no sound one."""
    try:
        found = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(found, dict) and isinstance(found.get("files"), dict)
    return found if is_ours and found.get("format") == FORMAT else {}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(file: GGUF, family: Family, folder: Path, record: Mapping[str, Any], tell: Tell) -> None:
    """Make the folder beside its place, and put it there when it is whole."""
    plan = _plan(file, family)
    _check_room(file, folder.parent)
    tell(f"{file.path.name} is GGUF: converting it once, into {folder}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _not_written(folder, error) from error
    try:
        rounded = _fill(file, plan, beside)
        files = {path.name: path.stat().st_size for path in sorted(beside.iterdir())}
        _write_json(beside / RECORD, {**record, "files": files})
        _place(beside, folder)
    except (OSError, RuntimeError) as error:  # MLX's own when it writes a file
        raise _not_written(folder, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if rounded:
        tell(f"{file.path.name}: {rounded}")


def _sweep(folder: Path) -> None:
    """Remove what a conversion to this folder left behind that was killed a day ago or earlier."""
    for old in folder.parent.glob(f".{folder.name}.*"):
        if time.time() - old.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(old, ignore_errors=True)


def _not_written(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{folder} cannot be written ({error}). XDG_CACHE_HOME names the folder that holds it."
    )


def _place(beside: Path, folder: Path) -> None:
    """Rename a finished folder; another process may have made the same one meanwhile."""
    beside.chmod(0o755)
    try:
        beside.replace(folder)
    except OSError as error:
        if not _record(folder):
            raise OSError(f"{error.strerror}; delete what is there") from None


@dataclass(frozen=True)
class _Plan:
    """What becomes of a file, decided from its header alone."""

    family: Family
    config: dict[str, Any]
    names: dict[str, str]
    """GGUF's names of all tensors that are taken to mlx-lm's."""
    others: dict[str, Any]
    """The other JSON files by their names."""


def _plan(file: GGUF, family: Family) -> _Plan:
    config = config_of(file, family)
    names = tensor_names(family, config)
    _check_tensors(file, names, config)
    words = read_tokenizer(file, config["vocab_size"], config["max_position_embeddings"])
    config |= words.ids
    if quantisation := _quantisation(file, names):
        config["quantization"] = config["quantization_config"] = quantisation
    others = {
        "tokenizer.json": words.tokenizer,
        "tokenizer_config.json": words.config,
        "generation_config.json": words.ids,
    }
    return _Plan(family, config, names, others)


def _check_tensors(file: GGUF, names: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Raises: ConfigError when tensors are missing, too many, or not of the model's sizes."""
    missing = sorted(names.keys() - file.tensors.keys())
    if missing:
        raise refused(file.path, f"it lacks {len(missing)} tensors, {_some(missing)}")
    extra = sorted(file.tensors.keys() - names.keys() - {ROPE_FACTORS})
    if extra:
        raise refused(file.path, f"{len(extra)} of its tensors have no place: {_some(extra)}")
    for name, theirs in names.items():
        wanted = _shape(theirs, config)
        if file.tensors[name].shape != wanted:
            raise refused(
                file.path,
                f"its {name} is {file.tensors[name].shape} where its settings make it {wanted}",
            )


def _some(names: list[str]) -> str:
    return ", ".join(f"{name!r:.60}" for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _shape(name: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a tensor by mlx-lm's name."""
    width, size, inner = (config[n] for n in ("hidden_size", "head_dim", "intermediate_size"))
    queries, keys = (size * config[n] for n in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        "embed_tokens": (config["vocab_size"], width),
        "lm_head": (config["vocab_size"], width),
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
        "q_norm": (size,),
        "k_norm": (size,),
    }
    part, end = name.split(".")[-2:]
    found = shapes.get(part, (width,))
    return found[:1] if end == "bias" else found


def _quantisation(file: GGUF, names: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization` of config.json: what most matrices have, and all that differ from it."""
    bits = {
        theirs.removesuffix(".weight"): bits_of(file.tensors[ours].type)
        for ours, theirs in names.items()
        if len(file.tensors[ours].shape) == 2
    }
    counted = Counter(number for number in bits.values() if number)
    if not counted:
        return {}
    common = counted.most_common(1)[0][0]
    settings: dict[str, Any] = {"group_size": GROUP, "bits": common}
    for path, number in bits.items():
        if number != common:
            settings[path] = {"group_size": GROUP, "bits": number} if number else False
    return settings


def _check_room(file: GGUF, root: Path) -> None:
    """Raises: ConfigError when the disk of the cache has no room for the folder."""
    place = root
    while not place.exists():
        place = place.parent
    # Numbers that are quantised anew take 9 bits, the others at most one bit more than in the file.
    most = sum(max(t.nbytes, t.nbytes * 9 / t.type.bits) for t in file.tensors.values()) * 1.25
    wanted, free = int(most) + SPARE_BYTES, shutil.disk_usage(place).free
    if wanted > free:
        raise ConfigError(
            f"Converting {file.path} takes up to {wanted / 1e9:.1f} GB in {root}, and its disk has "
            f"{free / 1e9:.1f} GB free. Make room, or set XDG_CACHE_HOME to a folder on another."
        )


def _fill(file: GGUF, plan: _Plan, folder: Path) -> str:
    """Write all files of a folder; returns what was rounded, in words."""
    rounding = _Rounding()
    small = _float_type(file, plan)
    shards = list(_shards(file, plan.names))
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else "model"
        arrays: dict[str, mx.array] = {}
        for ours in shard:
            arrays |= _arrays(file, plan, ours, small, rounding)
        mx.save_safetensors(str(folder / f"{name}.safetensors"), arrays, {"format": "mlx"})
    config = {**plan.config, "torch_dtype": _NAMES[small]}
    for name, value in {"config.json": config, **plan.others}.items():
        _write_json(folder / name, value)
    licence = file.metadata.get("general.license")
    if isinstance(licence, str) and len(licence) <= MOST_LICENCE:
        card = f"---\nlicense: {json.dumps(licence)}\n---\n"
        (folder / "README.md").write_text(card, encoding="utf-8")
    return rounding.text()


_NAMES: dict[Any, str] = {
    mx.float16: "float16",
    mx.bfloat16: "bfloat16",
    mx.float32: "float32",
}


def _shards(file: GGUF, names: Mapping[str, str]) -> Iterator[list[str]]:
    """GGUF's names in groups of about SHARD bytes."""
    shard, size = [], 0
    for name in names:
        if shard and size + file.tensors[name].nbytes > SHARD:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += file.tensors[name].nbytes
    yield shard


def _arrays(
    file: GGUF, plan: _Plan, name: str, small: Any, rounding: _Rounding
) -> dict[str, mx.array]:
    """A tensor under mlx-lm's names, its rows and numbers as mlx-lm has them."""
    tensor = file.tensors[name]
    found = convert(file, tensor)
    rounding.add(tensor, found)
    base = plan.names[name].rsplit(".", 1)[0]
    if len(tensor.shape) == 1:
        end = plan.names[name].rsplit(".", 1)[1]
        return {f"{base}.{end}": _vector(plan, name, found.arrays["weight"]).astype(small)}
    heads = row_heads(plan.family, name, plan.config)
    arrays = {part: to_halves(a, heads) if heads else a for part, a in found.arrays.items()}
    mx.eval(arrays)
    return {f"{base}.{part}": array for part, array in arrays.items()}


def _vector(plan: _Plan, name: str, values: mx.array) -> mx.array:
    """A norm or a bias in float32 as mlx-lm has it."""
    values = values.astype(mx.float32)
    if plan.family.norms_plus_one and is_norm(name):
        return values - 1
    heads = row_heads(plan.family, name, plan.config)
    return to_halves(values, heads) if heads else values


def _vector_back(plan: _Plan, name: str, values: mx.array) -> mx.array:
    """The inverse of `_vector`."""
    if plan.family.norms_plus_one and is_norm(name):
        return values + 1
    heads = row_heads(plan.family, name, plan.config)
    return to_pairs(values, heads) if heads else values


def _float_type(file: GGUF, plan: _Plan) -> Any:
    """The type of norms and biases: 16 bits where that changes none of them, else float32.

    llama.cpp stores them in float32 whatever they were. In float32 they would make MLX compute all
    of a model's activations so.
    """
    kinds = {file.tensors[name].type.name for name in plan.names if _is_matrix(file, name)}
    if "F32" in kinds or (plan.family.overflows and "BF16" not in kinds):
        return mx.float32
    small = mx.bfloat16 if "BF16" in kinds else mx.float16
    for name in (name for name in plan.names if not _is_matrix(file, name)):
        stored = convert(file, file.tensors[name]).arrays["weight"].astype(mx.float32)
        values = _vector(plan, name, stored).astype(small).astype(mx.float32)
        if not mx.array_equal(_vector_back(plan, name, values), stored).item():
            return mx.float32
    return small


def _is_matrix(file: GGUF, name: str) -> bool:
    return len(file.tensors[name].shape) == 2


class _Rounding:
    """What quantising anew has changed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.error = 0.0
        self.norm = 0.0

    def add(self, tensor: Tensor, found: Converted) -> None:
        """Count a tensor."""
        if is_lossless(tensor.type):
            return
        self.counts[f"{tensor.type.name} to {found.bits} bits"] += 1
        self.error += found.squared_error
        self.norm += found.squared_norm

    def text(self) -> str:
        """All of it in one line; empty when nothing was changed."""
        if not self.counts:
            return ""
        kinds = ", ".join(f"{count} tensors from {kind}" for kind, count in self.counts.items())
        relative = (self.error / self.norm) ** 0.5 if self.norm else 0.0
        return f"{kinds}; their numbers changed by {relative:.2%} (root mean square, relative)"


def _write_json(path: Path, value: Any) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    beside.replace(path)
