"""The commands shown in README, docs and --help, as a reader would paste them."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
SHELL = ("", "bash", "sh", "shell")
"""Languages of fenced blocks that hold commands."""
ENDS = ("&&", "||", "&", "|", ";")


@dataclass(frozen=True)
class Command:
    """One program call: its words, and the text piped into it."""

    words: tuple[str, ...]
    stdin: str = ""

    def __str__(self) -> str:
        return " ".join(self.words)


def documented() -> dict[Command, str]:
    """Every command of README, docs and --help, with the first page that shows it."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found: dict[Command, str] = {}
    for page in pages:
        for line in block_lines(page.read_text(encoding="utf-8")):
            for command in parse(line):
                found.setdefault(command, str(page.relative_to(ROOT)))
    for name, text in helps():
        for line in inspect.cleandoc(text).splitlines():
            if line.startswith("  "):
                for command in parse(line.strip()):
                    found.setdefault(command, f"{name} --help")
    return found


def block_lines(text: str) -> Iterator[str]:
    """Yield the lines of fenced shell blocks and of indented ones, continuations joined."""
    fence: str | None = None
    text = re.sub(r" *\\\n\s*", " ", text)
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fence = line.strip().strip("`") if fence is None else None
        elif fence in SHELL or (fence is None and line.startswith("    ")):
            yield line.strip()


def parse(line: str) -> Iterator[Command]:
    """Yield the calls of localrl and of example scripts in a line of shell."""
    if not re.search(r"(^|[\s/])(localrl|python examples/)", line):
        return
    line = re.sub(r"\s{2,}.*|\s+#.*", "", line)  # the remark behind a command
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    stdin = ""
    for word in [*lexer, ";"]:
        if word not in ENDS:
            words.append(word)
            continue
        yield from _call(words, stdin)
        stdin = " ".join(words[1:]) if word == "|" and words[:1] == ["echo"] else ""
        words = []


def _call(words: list[str], stdin: str) -> Iterator[Command]:
    words = words[1:] if words[:1] == ["time"] else words
    if ">" in words:
        words = words[: words.index(">")]
    if "..." in words:  # an outline, not a command
        return
    if len(words) > 1 and Path(words[0]).name == "localrl":
        yield Command(("localrl", *words[1:]), stdin)
    elif len(words) > 1 and words[0] == "python" and words[1].startswith("examples/"):
        yield Command(tuple(words), stdin)


def helps() -> Iterator[tuple[str, str]]:
    """Yield the name and the help text of every command."""
    from localrl.cli.main import cli

    def walk(name: str, command: click.Command) -> Iterator[tuple[str, str]]:
        yield name, command.help or ""
        if isinstance(command, click.Group):
            context = click.Context(command)
            for below in command.list_commands(context):
                found = command.get_command(context, below)
                assert found is not None
                yield from walk(f"{name} {below}", found)

    yield from walk("localrl", cli)
