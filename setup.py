"""Builds the two compiled parts, for Linux CPUs; everything else stands in pyproject.toml."""

import sys

from setuptools import Extension, setup

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

setup(ext_modules=extensions if sys.platform == "linux" else [])
