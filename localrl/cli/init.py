"""`localrl init`: a starter folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import click

from localrl.errors import ConfigError

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
COPIED = ("README.md", "rewards.py", "train.toml")
ROWS = 200


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def init(folder: Path) -> None:
    """Create a small folder that is ready to train: settings, data, a reward, a README.

    DIR must be new or empty; nothing is overwritten.

    \b
      localrl init first
      cd first
      localrl train train.toml
    """
    files = {name: (TEMPLATES / name).read_text(encoding="utf-8") for name in COPIED}
    files["data.jsonl"] = _data()
    _write(folder, files)
    click.echo(f"{folder} contains {', '.join(sorted(files))}")
    click.echo(f"next: cd {shlex.quote(str(folder))}\n      localrl train train.toml")


def _data() -> str:
    """Return JSONL rows of sums in the embedded model's notation, always the same ones."""
    from localrl.tasks.builtin import load_task

    task = load_task("sums", train_prompts=ROWS)
    rows = [
        {"prompt": example.messages[-1]["content"], "answer": example.answer}
        for example in map(task.train, range(ROWS))
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """Write all files into a new or empty folder, or none of them.

    Raises: ConfigError if the folder is not empty or a file cannot be written.
    """
    written: list[Path] = []
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and was left unchanged. Choose a new folder.")
        for name, text in files.items():
            with (folder / name).open("x", encoding="utf-8", newline="\n") as file:
                written.append(folder / name)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink()
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise ConfigError(
            f"Cannot write to {folder}: {error.strerror}. Choose another folder."
        ) from None
