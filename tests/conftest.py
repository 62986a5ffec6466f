"""Shared fixtures: tiny real models, made once per session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the Hub's client
# Two threads of a BLAS wait for each other: on a busy machine that is slower than one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import tiny

from localrl.backend import kernels

# No test waits for timings, and none depends on them but those that set this themselves.
os.environ.setdefault("LOCALRL_KERNELS", str(kernels.builds()[-1]) if kernels else "numpy")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, and no process that one starts, reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("models") / "tiny")


METAL = os.environ.get("LOCALRL_TEST_METAL")
"""A format and a limit, such as bf16-10: all tests then compute as Metal does, see `emulation`."""


@pytest.fixture(scope="module", params=["mlx"] if METAL else ["cpu", "mlx"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each `model.engine` in turn: whole loops run on both."""
    return request.param


@pytest.fixture(scope="session", autouse=METAL is not None)
def emulated_metal() -> Iterator[None]:
    """Round as Metal does, with the models' floats in 16 bits unless a test says otherwise."""
    from emulation import metal

    from localrl.config import RunConfig

    assert METAL is not None
    dtype, limit = METAL.split("-")
    create = RunConfig.create

    def created(settings: Any = None, file: Any = None) -> RunConfig:
        return create({"model.dtype": dtype, "memory.dequantise": "off", **(settings or {})}, file)

    with pytest.MonkeyPatch.context() as patch, metal(limit=int(limit)):
        patch.setattr(RunConfig, "create", created)
        yield


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory):
    """A tiny policy whose adapters do something; tests must leave it as it is."""
    return tiny.make_tiny_policy(tmp_path_factory.mktemp("models") / "policy")
