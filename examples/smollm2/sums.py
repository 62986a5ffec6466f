"""Sums of two-digit numbers, each pair once: data for sums.toml."""

from itertools import combinations_with_replacement


def examples():
    """Rows like those of a JSONL file. One in eight is held out, by a hash of its prompt."""
    pairs = combinations_with_replacement(range(10, 100), 2)
    return [row(a, b) if (a + b) % 2 else row(b, a) for a, b in pairs]


def row(a, b):
    """One problem."""
    return {"prompt": f"Calculate {a} + {b}. Write only the result.", "answer": str(a + b)}
