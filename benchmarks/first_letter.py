"""The rows in benchmarks/first_letter/: which of five letters comes first in the alphabet.

    python benchmarks/first_letter.py

The embedded model knows letters and their order, but not this question: at first it answers with
one of the letters in one case of seven. Sets of letters that its training held out are for
evaluation alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

from localrl.tasks.builtin import held_out

PLACE = Path(__file__).resolve().with_name("first_letter")
COUNTS = {"train": 64, "test": 128}


def rows(part: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield different rows of one part."""
    rng, seen = Random(part), set[str]()
    while len(seen) < count:
        letters = "".join(rng.sample(ascii_lowercase, 5))
        if letters not in seen and held_out("sorting", tuple(letters)) == (part == "test"):
            seen.add(letters)
            yield {"prompt": f"{letters}?", "answer": min(letters), "options": list(letters)}


def main() -> None:
    """Write both parts."""
    for part, count in COUNTS.items():
        lines = [json.dumps(row) + "\n" for row in rows(part, count)]
        (PLACE / f"{part}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
