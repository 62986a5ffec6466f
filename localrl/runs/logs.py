"""Files of the run folder: strict JSON lines that survive a crash, and small files written whole.

Strict means that every JSON reader accepts them: NaN and infinity, which JSON lacks, become null.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localrl.errors import CheckpointError, DataError
from localrl.records import DropReason, Leaf, Node, ScoredGroup

ROLLOUTS_FORMAT = 1
DIGITS = 4


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Return strict JSON in UTF-8; numpy values become numbers and lists, NaN and infinity null.

    Values that JSON cannot represent (paths, dates) are written as text.
    """
    text = json.dumps(_strict(value), ensure_ascii=False, allow_nan=False, indent=indent)
    # A lone surrogate has no UTF-8 form; backslashreplace writes it as a valid JSON escape.
    return text.encode("utf-8", "backslashreplace")


def _strict(value: Any) -> Any:
    if isinstance(value, np.ndarray) and _is_plain(value):
        return value.tolist()  # the bulk of a rollout: not checked number by number
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_strict(item) for item in value]
    return str(value)


def _is_plain(array: np.ndarray) -> bool:
    kind = array.dtype.kind
    return kind in "biu" or (kind == "f" and bool(np.isfinite(array).all()))


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a small file as a whole: after a crash, either the old one or the new one exists."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a rename to disk, so that it survives a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot do this, and need not
            os.fsync(fd)
    finally:
        os.close(fd)


class JsonLines:
    """An append-only file of JSON lines; each line is flushed when it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    @property
    def size(self) -> int:
        """Number of bytes written so far, including those of earlier processes."""
        return self._file.tell()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line.

        Raises: CheckpointError if it cannot be written; then no part of it is.
        """
        size = self.size
        try:
            self._file.write(to_json(record) + b"\n")
            self._file.flush()
        except OSError as error:
            self._take_back(size)
            raise CheckpointError(
                f"{self._file.name} cannot be written: {error.strerror}. Everything written before "
                "is safe. Free some disk space, then continue with --resume."
            ) from error

    def cut(self, size: int) -> None:
        """Remove all lines after the first `size` bytes.

        Raises: CheckpointError if the file is shorter.
        """
        if size > self.size:
            raise CheckpointError(
                f"{self._file.name} has {self.size} bytes, but the run had written {size}: lines "
                "are missing and cannot be recovered. Start a new run."
            )
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)

    def ends_a_line(self, size: int) -> bool:
        """Return True if the file has this many bytes and the last of them ends a line."""
        if not 0 < size <= self.size:
            return size == 0
        with Path(self._file.name).open("rb") as file:
            file.seek(size - 1)
            return file.read(1) == b"\n"

    def ends_with(self, step: int, size: int) -> bool:
        """Return True if the first `size` bytes are intact lines, the last of them of this step."""
        steps = [of for begin, of, _ in self._steps() if begin < size]
        return not steps or (None not in steps and steps[-1] == step)

    def bytes_of(self, step: int) -> int:
        """Return the bytes of the intact lines of steps up to this one."""
        return sum(len(line) for _, of, line in self._steps() if of is not None and of <= step)

    def keep(self, step: int) -> None:
        """Remove all but the intact lines of steps up to this one.

        Raises: CheckpointError if the file cannot be written; then it stays as it was.
        """
        path = Path(self._file.name)
        fresh = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            with fresh.open("wb") as file:
                kept = (line for _, of, line in self._steps() if of is not None and of <= step)
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror}. Free some disk space, then continue "
                "with --resume."
            ) from error
        finally:
            fresh.unlink(missing_ok=True)
        self._file.close()
        self._file = path.open("ab")

    def _steps(self) -> Iterator[tuple[int, int | None, bytes]]:
        """Yield the position of each line, its step (None if it is damaged), and the line."""
        begin = 0
        with Path(self._file.name).open("rb") as file:
            for line in file:
                yield begin, _step_of(line), line
                begin += len(line)

    def mend(self) -> None:
        """Remove a last line left incomplete by a crash, so that the next one starts on a new
        line."""
        whole = Path(self._file.name).read_bytes().rpartition(b"\n")
        self.cut(len(whole[0] + whole[1]))

    def _take_back(self, size: int) -> None:
        """Discard data that could not be written, in the buffer and in the file."""
        path = Path(self._file.name)
        with contextlib.suppress(OSError):
            self._file.close()  # closing tries to write once more
        os.truncate(path, size)
        self._file = path.open("ab")

    def sync(self) -> None:
        """Sync all lines to disk, so that they survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; no more lines can be written."""
        self._file.close()


def _step_of(line: bytes) -> int | None:
    """Return the step of a line of metrics or rollouts; None if the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) and line.endswith(b"\n") else None
    return step if isinstance(step, int) else None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read the records of a file of JSON lines; an incomplete last line is skipped.

    Raises:
        DataError: another line is not a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n"):
                    return
                record = None
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}, line {number} is not a JSON object: {line[:60]!r}. "
                    "Remove the line, or take the file from a backup."
                )
            yield record


@dataclass(frozen=True)
class GroupRecord:
    """The result of a group: the input of one line of rollouts.jsonl."""

    scored: ScoredGroup
    advantages: Sequence[float | None]
    """One value per node; None for a node without an advantage."""
    dropped: Sequence[DropReason | None]
    """One value per leaf: the reason why its completion was not trained; None if it was."""
    extra: Sequence[Mapping[str, Any]] = ()
    """One mapping per leaf, if any: the values that reward functions logged with it."""
    pieces: Sequence[Sequence[str]] = ()
    """One list per node, if any: the text of each token, so that reading needs no tokenizer."""

    @property
    def kept(self) -> bool:
        """True if any of its completions was trained."""
        return None in self.dropped

    @property
    def reason(self) -> DropReason | None:
        """The reason why no completion was trained; "no coefficient" if there are several."""
        reasons = set(self.dropped)
        if self.kept or not reasons:
            return None
        return reasons.pop() if len(reasons) == 1 else "no coefficient"


def rollout_line(step: int, record: GroupRecord) -> dict[str, Any]:
    """Return the JSON object of one group; fields with default values are omitted from its nodes.

    Defaults are: sampled, all true; cond_weight, 1; version and round, 0; no old_logprobs. A leaf
    without `dropped` was trained.
    """
    group = record.scored.group
    nodes = [_node(n, a) for n, a in zip(group.nodes, record.advantages, strict=True)]
    if record.pieces:
        nodes = [n | {"pieces": p} for n, p in zip(nodes, record.pieces, strict=True)]
    return {
        "format": ROLLOUTS_FORMAT,
        "step": step,
        "example": group.example.id,
        "messages": group.example.messages,
        "prompt_ids": group.prompt_ids,
        "planned_roots": group.planned_roots,
        "nodes": nodes,
        "leaves": [_leaf(leaf, i, record) for i, leaf in enumerate(group.leaves)],
        "kept": record.kept,
        "reason": record.reason,
    }


def _node(node: Node, advantage: float | None) -> dict[str, Any]:
    line: dict[str, Any] = {
        "parent": node.parent,
        "token_ids": node.token_ids,
        "sampled_logprobs": _rounded(node.sampled_logprobs),
        "entropies": _rounded(node.entropies),
        "advantage": advantage,
    }
    if not node.sampled.all():
        line["sampled"] = node.sampled
    if node.cond_weight != 1.0:
        line["cond_weight"] = node.cond_weight
    if node.version:
        line["version"] = node.version
    if node.round:
        line["round"] = node.round
    if node.old_logprobs is not None:
        line["old_logprobs"] = _rounded(node.old_logprobs)
    return line


def _leaf(leaf: Leaf, index: int, record: GroupRecord) -> dict[str, Any]:
    scored = record.scored
    line = {
        "node": leaf.node,
        "finish_reason": leaf.finish_reason,
        "reward": scored.rewards[index],
        "parts": {name: values[index] for name, values in scored.parts.items()},
        "text": leaf.text,
    }
    if leaf.beside:
        line["beside"] = leaf.beside
    if leaf.messages:
        line["messages"] = leaf.messages
    if record.dropped[index] is not None:
        line["dropped"] = record.dropped[index]
    if record.extra and record.extra[index]:
        line["extra"] = record.extra[index]
    return line


def _rounded(values: np.ndarray) -> np.ndarray:
    # In float64, because 0.1 in float32 prints as 0.10000000149; + 0.0 turns -0.0 into 0.0.
    return np.round(values.astype(np.float64), DIGITS) + 0.0
