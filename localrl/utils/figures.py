"""Formats numbers of any size in a few characters."""

from __future__ import annotations

LARGE = 1e6
"""From here on a number is written with an exponent: 1e300 would take 301 digits."""


def fixed(value: float, digits: int = 3) -> str:
    """Format a number with so many decimals, or in scientific notation if it is large."""
    return f"{value:.3g}" if abs(value) >= LARGE else f"{value:.{digits}f}"
