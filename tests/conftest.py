"""Shared fixtures: tiny real models, made once per session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="module", params=["cpu", "mlx"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each `model.engine` in turn: whole loops run on both."""
    return request.param


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory):
    """A tiny policy whose adapters do something; tests must leave it as it is."""
    return tiny.make_tiny_policy(tmp_path_factory.mktemp("models") / "policy")
