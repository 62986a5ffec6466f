"""Export of a model with its adapter merged in, as one GGUF file for Ollama, LM Studio, llama.cpp.

The file is read back before it gets its final name, by the code that reads other GGUF files. The
kept share of the update is measured on that, and a model that comes back different is an error.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localrl.errors import CheckpointError, ConfigError
from localrl.export.adapters import Adapter
from localrl.export.base import front_matter
from localrl.export.fused import DenseTensor, LayerUpdate, attached, dense_tensors, survival
from localrl.export.tensors import read_json
from localrl.gguf.families import (
    ROPE_FACTORS,
    GGUFFamily,
    family_of,
    is_norm,
    row_heads,
    tensor_names,
    to_pairs,
)
from localrl.gguf.layout import fill, make_plan
from localrl.gguf.reader import GGUF, Tensor, read_gguf
from localrl.gguf.settings import config_of, metadata_of, rope_factors
from localrl.gguf.vocabulary import Special, tokenizer_metadata
from localrl.gguf.writer import FILE_TYPES, MATRICES, need_package, plan_tensors, write_file
from localrl.policy.folder import check_folder
from localrl.policy.model import load_model
from localrl.policy.tokenizer import Tokenizer, load_tokenizer

SAMPLE = (
    "The year 2024: it's 12,345.67 kg!\n\n  Zürich, 東京, Ελλάδα, नमस्ते 🙂\tx_1 = [y**2]; DON'T\r\n"
)
"""Text that must tokenize the same with the file as with the model's folder."""
UNWRITTEN = ("model_type", "tie_word_embeddings", "rope_parameters", "rope_scaling")
"""Settings of a family that are compared in another way or stored elsewhere."""
ROPE_DEFAULTS = {"beta_fast": 32, "beta_slow": 1}
"""Defaults of llama.cpp for keys missing in a file."""


@dataclass(frozen=True)
class WrittenGGUF:
    """A written GGUF file."""

    path: Path
    size: int
    """Size in bytes."""
    bits: int
    rounding: float
    """|file - model| / |model| over all matrices."""
    layers: tuple[LayerUpdate, ...]
    """Fidelity of the update, as for `Fused`."""


def export_gguf(
    adapter: Adapter,
    model_folder: Path,
    out: Path,
    *,
    bits: int = 8,
    base_bits: int = 0,
    tell: Callable[[str], None] = lambda _: None,
    look: Callable[[Path], None] = lambda _: None,
) -> WrittenGGUF:
    """Write the model with the adapter merged in to the file `out`, all at once.

    bits: number format of matrices: 8 (Q8_0) or 16 (F16). base_bits: see `export_fused`.
    tell: called with a line stating the size before anything is written.
    look: called with a folder converted from the file, before the file gets its final name.

    Raises: ConfigError if `out` exists, if the family, the tokenizer or a setting cannot be
    expressed in GGUF, or if the disk is too full; CheckpointError if it cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} already exists. Name another file after --gguf.")
    need_package()
    plan = _plan(adapter, model_folder, bits, base_bits)
    _check_room(plan, out)
    tell(f"{MATRICES[bits].name}, {plan.size / 1e6:.0f} MB, to {out}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
            fresh, again = Path(place) / "model.gguf", Path(place) / "again"
            rounding = write_file(
                fresh, plan.family.architecture, plan.metadata, plan.tensors, plan.values
            )
            again.mkdir()
            file = read_gguf(fresh)
            fill(file, make_plan(file, plan.family), again)
            _check_tokens(model_folder, again)
            base = load_model(model_folder, quantize=base_bits).model
            layers = tuple(survival(base, load_model(again).model, adapter, model_folder))
            look(again)
            size = fresh.stat().st_size
            os.replace(fresh, out)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"Cannot write the model to {out}: {error}.") from error
    return WrittenGGUF(out, size, bits, rounding, layers)


@dataclass(frozen=True)
class _Plan:
    """Everything in a file except tensor values, which are computed one tensor at a time."""

    family: GGUFFamily
    config: Mapping[str, Any]
    """Settings of mlx-lm's family, including defaults."""
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    """Tensors by GGUF name, as in `names`, and Llama 3's rope factors."""
    names: Mapping[str, str]
    dense: Mapping[str, DenseTensor]
    factors: np.ndarray | None

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def values(self, tensor: Tensor) -> np.ndarray:
        """Compute a tensor's values in float32, in GGUF's layout."""
        if tensor.name == ROPE_FACTORS and self.factors is not None:
            return self.factors
        array = self.dense[self.names[tensor.name]].make()
        if self.family.norms_plus_one and is_norm(tensor.name):
            array = array + 1
        heads = row_heads(self.family, tensor.name, self.config)
        values = np.array(to_pairs(array, heads) if heads else array)
        if not np.isfinite(values).all():
            raise ConfigError(
                f"{tensor.name} contains NaN or infinity; the model or adapter is broken."
            )
        return values


def _plan(adapter: Adapter, folder: Path, bits: int, base_bits: int) -> _Plan:
    family = family_of(check_folder(folder)["model_type"])
    tokenizer = load_tokenizer(folder)
    model = attached(load_model(folder, quantize=base_bits).model, adapter, folder)
    dense = dense_tensors(model)
    config = {
        **dataclasses.asdict(model.args),
        "tie_word_embeddings": "lm_head.weight" not in dense,
    }
    names = tensor_names(family, config)
    odd = sorted(set(names.values()) ^ dense.keys())
    if odd:
        raise ConfigError(
            f"GGUF cannot store this {family.model_type} model: {len(odd)} tensors do not belong "
            f"to the family, such as {odd[0]}."
        )
    shapes = {ours: dense[theirs].shape for ours, theirs in names.items()}
    factors = rope_factors(config)
    if factors is not None:
        shapes = {ROPE_FACTORS: factors.shape, **shapes}
    metadata = {
        **_general(adapter, folder, bits),
        **metadata_of(family, config),
        **tokenizer_metadata(
            read_json(folder / "tokenizer.json"),
            _special(tokenizer),
            family,
            shapes["token_embd.weight"][0],
        ),
    }
    tensors = plan_tensors(shapes, bits)
    _check_settings(model.args, family, metadata, tensors, factors)
    return _Plan(family, config, metadata, tensors, names, dense, factors)


def _general(adapter: Adapter, folder: Path, bits: int) -> dict[str, Any]:
    """Return general metadata: the model's origin, and nothing about this machine."""
    found: dict[str, Any] = {
        "general.type": "model",
        "general.name": (adapter.base_id or folder.name).rsplit("/", 1)[-1] + " localrl",
        "general.file_type": FILE_TYPES[bits],
        "general.quantization_version": 2,
    }
    licence = front_matter(folder).get("license")
    if isinstance(licence, str):
        found["general.license"] = licence
    if adapter.base_id is not None:
        found["general.base_model.count"] = 1
        found["general.base_model.0.name"] = adapter.base_id.rsplit("/", 1)[-1]
        found["general.base_model.0.repo_url"] = f"https://huggingface.co/{adapter.base_id}"
    return found


def _special(tokenizer: Tokenizer) -> Special:
    inner = tokenizer.inner
    end, begin = inner.eos_token_id, inner.bos_token_id
    others = sorted(tokenizer.end_ids - {end})
    plain = inner.encode("a", add_special_tokens=True)
    template = inner.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Special(
        ends=(end, *others) if end in tokenizer.end_ids else tuple(others),
        begin=begin,
        padding=inner.pad_token_id,
        unknown=inner.unk_token_id,
        begins=begin is not None and plain[:1] == [begin],
        template=template,
    )


def _check_settings(
    args: Any,
    family: GGUFFamily,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    factors: np.ndarray | None,
) -> None:
    """Check that the settings survive being written and read back.

    Raises: ConfigError for a setting that would change.
    """
    data = (np.zeros(0) if factors is None else factors).view(np.uint8)  # the first tensor, if any
    again = config_of(GGUF(Path("the file"), metadata, tensors, data), family)
    back = dataclasses.asdict(type(args).from_dict(again))
    given = dataclasses.asdict(args)
    lost = [n for n in given if n not in UNWRITTEN and not _same(given[n], back[n])]
    if not _same_rope(given.get("rope_scaling"), again.get("rope_scaling")):
        lost.append("rope_scaling")
    if lost:
        name = lost[0]
        raise ConfigError(
            f"GGUF cannot store this model's {name} {given[name]!r:.100} "
            f"(llama.cpp would use {back[name]!r:.100}). Use --fused instead."
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return one is not None and other is not None and np.float32(one) == np.float32(other)
    return one == other


def _same_rope(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Compare two rope scalings; anything missing in the second must be llama.cpp's default."""
    ours, theirs = _rope(one), _rope(other)
    known = {"factor", *theirs} if theirs else {}
    rest = {name: value for name, value in ours.items() if name not in known}
    return all(_same(ours.get(name), value) for name, value in theirs.items()) and all(
        ROPE_DEFAULTS.get(name) == value for name, value in rest.items()
    )


def _rope(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    found = dict(scaling or {})
    kind = found.pop("type", None)
    kind = found.pop("rope_type", kind)
    found.pop("rope_theta", None)
    return {**found, "rope_type": kind} if kind not in (None, "default") else {}


def _check_tokens(folder: Path, again: Path) -> None:
    """Check that the tokenizer survives the file.

    Raises: ConfigError if it came back different.
    """
    one, other = load_tokenizer(folder), load_tokenizer(again)
    if one.encode_text(SAMPLE) != other.encode_text(SAMPLE) or one.end_ids != other.end_ids:
        raise ConfigError(
            "This model's tokenizer changes when it is read back from GGUF, so the file would be "
            "wrong. Use --fused instead."
        )


def _check_room(plan: _Plan, out: Path) -> None:
    """Check the disk space for the file and for reading it back.

    Raises: ConfigError if the disk is too full.
    """
    place = out.parent
    while not place.exists():
        place = place.parent
    wanted, free = int(2.2 * plan.size), shutil.disk_usage(place).free
    if wanted > free:
        raise ConfigError(
            f"Writing {out} and reading it back takes {wanted / 1e9:.1f} GB, but its disk has only "
            f"{free / 1e9:.1f} GB free. Free some space, or name a file on another disk."
        )
