"""Builds the two compiled parts, for Linux CPUs; everything else stands in pyproject.toml."""

import sys

from setuptools import Extension, setup

KERNELS = ["team.h", "arithmetic.h", "columns.h", "attention.h"]
# `optional` turns a missing compiler into a warning.
extensions = [
    Extension("localrl._blas", ["localrl/c/blas.c"], optional=True),
    Extension(
        "localrl._kernels",
        ["localrl/c/kernels.c"],
        depends=[f"localrl/c/{name}" for name in KERNELS],
        # With `-fmath-errno` or traps a loop with a root or a choice in it is not vectorised.
        extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-pthread"],
        extra_link_args=["-pthread"],
        optional=True,
    ),
]

setup(ext_modules=extensions if sys.platform == "linux" else [])
