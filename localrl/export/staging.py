"""Staging of the files that may be pushed: five names in their own folder, checked first."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from localrl.errors import ConfigError, DataError
from localrl.export.adapters import (
    CONFIG,
    NOTE,
    PEFT_WEIGHTS,
    WEIGHTS,
    peft_note,
    read_adapter,
)
from localrl.export.base import is_hub_id
from localrl.export.card import Address, Sample, make_card
from localrl.export.facts import read_facts
from localrl.export.tensors import read_json
from localrl.runs.logs import read_jsonl

MARK = NOTE
"""File that marks a repository as pushed by localrl."""

ALLOWED = (WEIGHTS, PEFT_WEIGHTS, CONFIG, "README.md", MARK)

CONFIG_KEYS = (
    "fine_tune_type",
    "num_layers",
    "lora_parameters",
    "peft_type",
    "task_type",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "fan_in_fan_out",
    "bias",
    "target_modules",
    "layers_to_transform",
)
NOTE_KEYS = ("format", "sha256", "rank", "scale", "model_type", "peft_left_out", "versions")

STAND_IN = "user/name"
"""Base model's id in a dry run that knows none."""

SAMPLES = 3

TOKEN = re.compile(rb"hf_[A-Za-z0-9]{20,}")


@dataclass(frozen=True)
class Staged:
    """A file to be pushed."""

    name: str
    bytes: int


def stage(
    run: Path,
    folder: Path,
    repo_id: str,
    *,
    base_id: str | None = None,
    task_name: str | None = None,
    with_samples: bool = False,
    tell: Callable[[str], None] | None = None,
) -> list[Staged]:
    """Fill an empty folder with the files of a run that may be pushed; the run is only read.

    base_id: Hub id of the base model, if the adapter does not know it. task_name: name of the task
    in the card. with_samples: show some rollouts in the card. tell: receives a note if the base is
    unknown, and `STAND_IN` is used in its place.

    Raises: ConfigError if the run has no adapter, or its base is unknown without `tell`;
    CheckpointError if the adapter is damaged; DataError if a file cannot be read, or contains a
    token or a path of this machine.
    """
    facts = read_facts(run)
    adapter = run / "adapter"
    left_out = peft_note(adapter)
    known = read_adapter(adapter).base_id  # always read: this checks that the adapter is intact
    base = _base(run, base_id or known, tell)
    if task_name:
        facts = replace(facts, task=" ".join(task_name.split()), about=None)
    card = make_card(
        facts,
        Address(repo_id, base, left_out),
        list(_samples(run)) if with_samples else [],
    )
    (folder / "README.md").write_bytes(card.encode("utf-8", "replace"))
    _copy_json(adapter / CONFIG, folder, CONFIG_KEYS, base_model_name_or_path=base)
    _copy_json(adapter / NOTE, folder, NOTE_KEYS, base_model=base)
    for name in (WEIGHTS, PEFT_WEIGHTS):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, folder / name)
    staged = [folder / name for name in ALLOWED if (folder / name).exists()]
    for file in staged:
        _check_private(file, run)
    return [Staged(file.name, file.stat().st_size) for file in staged]


def _base(run: Path, base_id: str | None, tell: Callable[[str], None] | None) -> str:
    """Check the base model's Hub id.

    Raises: ConfigError if it is not one, unless it is unknown and there is `tell`.
    """
    if is_hub_id(base_id):
        return base_id
    if base_id is None and tell is not None:
        tell(
            f"note: the base model of {run} has no known Hub id; {STAND_IN} stands for it here. "
            f"A push needs the unquantised model: --base-id {STAND_IN}"
        )
        return STAND_IN
    raise ConfigError(
        f"The base model of {run} has no known Hub id, and without it nobody can use the "
        f"adapter{f' ({base_id!r} is not one)' if base_id else ''}. Pass the unquantised model "
        f"with --base-id {STAND_IN}."
    )


def _copy_json(source: Path, folder: Path, keys: Sequence[str], **more: str) -> None:
    """Copy the entries with these keys, and add more."""
    content = read_json(source)
    kept = {key: content[key] for key in keys if key in content} | more
    (folder / source.name).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _samples(run: Path) -> Iterator[Sample]:
    """Yield one completion of each of the first groups of the last step."""
    lines = list(read_jsonl(run / "rollouts.jsonl"))
    last = [line for line in lines if line["step"] == lines[-1]["step"]]
    for line in last[:SAMPLES]:
        prompt = "\n\n".join(str(message.get("content") or "") for message in line["messages"])
        leaf = line["leaves"][0]
        yield Sample(prompt, leaf["text"], leaf["reward"])


def _check_private(file: Path, run: Path) -> None:
    """Check a file for private content.

    Raises: DataError if it contains a token, the home folder, or the run's path.
    """
    data = file.read_bytes()
    places = {str(Path.home()), str(run.absolute()), str(run.resolve())}
    found = [place for place in places if len(place) > 1 and place.encode() in data]
    if TOKEN.search(data):
        found.append("something like a Hub token")
    if found:
        raise DataError(
            f"{file.name} contains {found[0]}, so nothing was pushed. Remove it from the run's "
            "adapter folder, or push without --with-samples."
        )
