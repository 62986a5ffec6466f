"""Builds the one compiled part, localrl._blas; everything else stands in pyproject.toml."""

import sys

from setuptools import Extension, setup

# Only MLX's Linux build needs the module. `optional` turns a missing compiler into a warning.
extensions = [Extension("localrl._blas", ["localrl/_blas.c"], optional=True)]

setup(ext_modules=extensions if sys.platform == "linux" else [])
