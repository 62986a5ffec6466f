"""The pretrained model, as `localrl pull smollm2-135m` leaves it; see `.ci/real`."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from localrl.policy.loading import find_model

NAME = "smollm2-135m"


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model's folder, out of the user's cache; all else has a cache of its own.

    In the place of the fixture for all tests, which hides the user's cache from the start.
    """
    folder = find_model(NAME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Nothing here may look for a machine elsewhere."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network connection was tried")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.fixture(scope="session")
def folder(own_cache: Path) -> Path:
    return own_cache
