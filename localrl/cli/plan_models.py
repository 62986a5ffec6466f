"""The table of `localrl plan --models`."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localrl.memory.limit import Limit
    from localrl.training.model_choice import Candidate

HEAD = (
    f"{'model':24}{'weights':>9}{'stored':>9}{'group':>7}{'tokens':>8}{'rows':>5}{'peak':>8}  where"
)


def fields_of(ranked: Sequence[Candidate], limit: Limit) -> dict[str, Any]:
    """Return the ranking as values for JSON."""
    return {
        "limit": vars(limit),
        "models": [
            {
                "model": one.name,
                "quantize": one.quantize,
                "source": one.source,
                "weights": one.weights,
                "weight_bytes": one.weight_bytes,
                "fits": one.plan is not None,
                "reaches_settings": one.reaches,
                "plan": vars(one.plan) if one.plan else None,
                "problem": one.problem or None,
            }
            for one in ranked
        ],
    }


def page(ranked: Sequence[Candidate], limit: Limit, mac: int | None) -> str:
    """Format the ranking as a table within 80 columns, and the command that comes next."""
    from localrl.memory.limit import show

    where = f"a Mac with {mac} GB" if mac else "this machine"
    room = f"{show(limit.bytes)} for MLX, {limit.reason}" if limit.bytes else limit.reason
    group, tokens = ranked[0].wished
    lines = textwrap.wrap(f"{where}: {room}", 80, subsequent_indent="  ")
    lines += [f"settings: a group of {group}, {tokens} tokens", "", HEAD]
    return "\n".join([*lines, *map(_row, ranked), "", *_legend(ranked, mac)])


def _row(one: Candidate) -> str:
    from localrl.memory.limit import show

    start = f"{one.title:24}{_count(one.weights):>9}{_stored(one.weight_bytes):>9}"
    if one.plan is None:
        return f"{start}{'does not fit':>28}  {one.source}"
    plan = one.plan
    peak = "unknown" if plan.predicted_bytes is None else show(plan.predicted_bytes)
    sizes = f"{plan.group_size:>7}{plan.max_completion_tokens:>8}{plan.decode_rows:>5}"
    return f"{start}{sizes}{peak:>8}  {one.source}"


def _count(weights: int) -> str:
    if weights >= 0.9995e9:
        return f"{weights / 1e9:.1f} B"
    return f"{weights / 1e6:.0f} M" if weights >= 1e7 else f"{weights / 1e6:.1f} M"


def _stored(size: int) -> str:
    from localrl.memory.limit import show

    return show(size) if size >= 10**7 else f"{size / 1e6:.1f} MB"


def _legend(ranked: Sequence[Candidate], mac: int | None) -> list[str]:
    lines = [
        "stored  bytes of the weights, at 4 bits unless --quantize says otherwise",
        "rows    completions decoded at once; with fewer than in a step it takes longer",
        "peak    predicted for MLX's memory, with prompts as long as the settings allow",
        "where   embedded, here: no network; index: `localrl pull` fetches a package;",
        "        Hub: as mlx-community converted it, if it did",
    ]
    best = next((one for one in ranked if one.plan is not None), None)
    return lines if best is None else [*lines, "", *_next(best, mac)]


def _next(best: Candidate, mac: int | None) -> list[str]:
    quantize = f" --quantize {best.quantize}" if best.quantize else ""
    model = f"--model {shlex.quote(best.name)}{quantize}"
    machine = f" --mac {mac}" if mac else ""
    commands = [f"localrl plan {model}{machine}"]
    if best.source in ("index", "Hub"):
        commands.append(f"localrl pull {best.name}")
    commands.append(f"localrl train {model}")
    return [f"{'next:' if n == 0 else '':6}{line}" for n, line in enumerate(commands)]
