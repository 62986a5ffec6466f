"""No step in C is slower than NumPy: of the build that is chosen here, and of a narrower one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from kernels import as_avx2, in_child

from localrl.backend import kernels

MOST = 1.2
"""Times as long as NumPy: what is measured twice differs by as much."""


@pytest.mark.skipif(
    kernels is None or 32 not in kernels.builds(), reason="no processor with AVX2, or no compiler"
)
@pytest.mark.parametrize("way", ["chosen", "avx2"])
def test_every_step_is_as_fast_as_numpy(way, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), **(as_avx2() if way == "avx2" else {})}
    slow: dict[str, float] = {}
    for _ in range(3):  # what is slow once may have been disturbed
        found = in_child(environment, "--quick")
        assert len(found) > 60
        slow = {name: found[name] for name in slow or found if found[name] < 1 / MOST}
        if not slow:
            return
    pytest.fail(f"slower than NumPy: {slow}")
