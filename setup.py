"""Builds the two compiled parts, for Linux CPUs; everything else stands in pyproject.toml."""

import sys

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

SOURCES = ["kernels.c", "steps16.c", "steps32.c", "steps64.c"]
HEADERS = ["steps.h", "team.h", "matmul.h", "build.h", "arithmetic.h", "columns.h"]
HEADERS += ["attention.h", "sampling.h"]
# `optional` turns a missing compiler into a warning.
extensions = [
    Extension("localrl._blas", ["localrl/engines/cpu/c/blas.c"], optional=True),
    Extension(
        "localrl._kernels",
        [f"localrl/engines/cpu/c/{name}" for name in SOURCES],
        depends=[f"localrl/engines/cpu/c/{name}" for name in HEADERS],
        # With `-fmath-errno` or traps a loop with a root or a choice in it is not vectorised.
        extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-pthread"],
        extra_link_args=["-pthread"],
        optional=True,
    ),
]


class OneSystem(Distribution):
    """A distribution whose wheel is for the system that it is built on."""

    def has_ext_modules(self) -> bool:
        """Return True: a wheel for any system would be taken by Linux, which compiles its own."""
        return True


class AnyPython(bdist_wheel):
    """A wheel without compiled parts: for every Python 3 on its system."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, ABI and system."""
        return "py3", "none", super().get_tag()[2]


if sys.platform == "linux":
    setup(ext_modules=extensions)
else:
    setup(distclass=OneSystem, cmdclass={"bdist_wheel": AnyPython})
