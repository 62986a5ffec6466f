"""The command in the process of the tests, which saves its start, two seconds of imports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from localrl.cli.main import main


@dataclass(frozen=True)
class Done:
    """What a finished process tells too."""

    returncode: int
    stdout: str
    stderr: str


def localrl(capture: pytest.CaptureFixture[str], *arguments: Any, cwd: Path) -> Done:
    """Run it to its end, there. `train` needs `--no-supervise` to stay in this process."""
    before = Path.cwd()
    capture.readouterr()
    os.chdir(cwd)
    try:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
    finally:
        os.chdir(before)
    out, err = capture.readouterr()
    assert isinstance(ended.value.code, int)
    return Done(ended.value.code, out, err)
