"""All-gather of per-rank results.

Records travel in checkpoint form, see `training.state`; examples, which every rank knows, do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from localrl.distributed.collective import Ranks
from localrl.errors import LocalRLError
from localrl.records import Example, Group, Leaf, Node, ScoredGroup
from localrl.utils.codec import from_bytes, to_bytes

T = TypeVar("T")

TYPES: dict[str, type] = {kind.__name__: kind for kind in (Group, Leaf, Node, ScoredGroup)}


def gather(ranks: Ranks, value: T) -> list[T]:
    """Return the value of each rank: plain data, arrays, or records of `TYPES`."""
    if ranks.size == 1:
        return [value]
    return [from_bytes(data, TYPES) for data in ranks.gather(to_bytes(value, TYPES))]


def map_sharded_groups(
    ranks: Ranks,
    examples: Sequence[Example],
    work: Callable[[Sequence[int]], Sequence[ScoredGroup]],
) -> list[ScoredGroup]:
    """Return the groups of all examples; each rank computes those of its own share.

    work: maps indices to one group for each. Groups travel without their examples.

    Raises: LocalRLError if another rank does not have the same examples.
    """
    indices = ranks.shard(range(len(examples)))
    found = list(work(indices)) if indices else []
    if ranks.size == 1:
        return found
    ids = [example.id for example in examples]
    told = gather(ranks, {"ids": ids, "found": [_with(group, None) for group in found]})
    for rank, one in enumerate(told):
        if one["ids"] != ids:
            raise LocalRLError(
                f"The ranks have diverged: rank {rank} works on {one['ids'][:3]}, rank "
                f"{ranks.rank} on {ids[:3]}. Continue from the last checkpoint with --resume."
            )
    bare = ranks.unshard([one["found"] for one in told])
    return [_with(group, example) for group, example in zip(bare, examples, strict=True)]


def _with(scored: ScoredGroup, example: Example | None) -> ScoredGroup:
    group: Any = replace(scored.group, example=example)  # type: ignore[arg-type]
    return replace(scored, group=group)
