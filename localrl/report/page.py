"""The report: one HTML file that needs no network and never treats model text as markup.

Jinja escapes everything it writes; completions travel as JSON without a `<` and enter the page only
as text nodes. A content security policy allows the script and the styles in the file, by their
hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from localrl.errors import ConfigError
from localrl.report import facts
from localrl.report.charts import Drawing, columns, draw, extremes
from localrl.report.curves import Chart, charts
from localrl.report.reading import Run, Score
from localrl.report.samples import ReportGroups, best_middle_worst, markup_free, sample
from localrl.report.verdict import verdict
from localrl.runs.logs import to_json, write_atomic
from localrl.utils.text import one_line, printable

GROUP_BYTES = 3_000_000
"""Size limit of the groups in a report; with everything else it stays below 5 MB."""
MOST_ROWS = 200
"""Most rows in the tables of events, evaluations and metrics; the last ones of the first two."""
SCRIPTS = ("page.js", "page-groups.js", "page-tree.js")
LIVE_SCRIPTS = ("page-live.js",)
"""Script files that are joined into the page's one script."""
MARK = '<meta name="generator" content="localrl">'
"""Marks a report, so that no other file is overwritten."""
COLOURS = (
    ("a", "advantage", "blue: better than expected, orange: worse"),
    ("e", "entropy", "the darker, the less certain the model was"),
    ("l", "surprisal", "the darker, the less likely the token was"),
)


@dataclass(frozen=True)
class WrittenReport:
    """A report on disk."""

    path: Path
    size: int
    words: str
    """Description of the groups that it contains."""


def write_report(run: Run, path: Path, *, group_bytes: int = GROUP_BYTES) -> WrittenReport:
    """Write the report of a run, replacing an earlier one.

    Raises: ConfigError if there is a file that is not a report, or if it cannot be written.
    """
    sampled = sample(run.path, group_bytes)
    page = make_page(run, sampled).encode("utf-8", "replace")
    try:
        _check_place(path)
        write_atomic(path, page)
    except OSError as error:
        raise ConfigError(
            f"The report {path} cannot be written: {error.strerror or error}. Choose another "
            "place with --out."
        ) from error
    return WrittenReport(path, len(page), groups_note(sampled))


def make_page(run: Run, sampled: ReportGroups, *, live: bool = False) -> str:
    """Render the HTML of a report; a live one asks its server again and again for a newer page."""
    styles, script = _file("page.css"), _script(live)
    drawings = [draw(chart) for chart in charts(run)]
    return _template().render(
        run=run,
        live=live,
        name=one_line(run.path.resolve().name),
        now=datetime.now(UTC).isoformat(" ", "minutes").removesuffix("+00:00"),
        styles=styles,
        script=script,
        policy=policy(live),
        mark=MARK,
        data=_data(sampled, drawings),
        drawings=drawings,
        sampled=sampled,
        note=groups_note(sampled),
        verdict=verdict(run),
        answers=facts.answers(run),
        cards=_cards(sampled),
        bars=[_bar(score) for score in facts.first_and_last(run) if score.interval],
        last=_last_step(run),
        plan=[(key, facts.size(v) if key.endswith("_bytes") and v else facts.number(v))
              for key, v in run.plan.items()],
        scores=run.scores[-MOST_ROWS:],
        events=[_event(event) for event in run.events[-MOST_ROWS:]],
        colours=COLOURS,
        facts=facts,
    )  # fmt: skip


def policy(live: bool = False) -> str:
    """Return the content security policy of a report: its own script and styles, by their hashes.

    A live one may also ask its own server; nothing else can be requested.
    """
    server = "connect-src 'self'; " if live else ""
    return (
        f"default-src 'none'; style-src '{_hash(_file('page.css'))}'; "
        f"script-src '{_hash(_script(live))}'; {server}"
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _script(live: bool) -> str:
    return "\n".join(map(_file, (*SCRIPTS, *(LIVE_SCRIPTS if live else ()))))


def groups_note(sampled: ReportGroups) -> str:
    """Describe which of the run's groups are shown."""
    if not sampled.total:
        return "no groups yet"
    if len(sampled.groups) == sampled.total:
        return f"all {sampled.total} groups of rollouts.jsonl"
    return (
        f"{len(sampled.groups)} of the {sampled.total} groups of rollouts.jsonl: the best, a "
        "typical and the worst one of the last step, and others spread evenly over the run"
    )


def _check_place(path: Path) -> None:
    if path.exists() and MARK.encode() not in path.read_bytes()[:1000]:
        raise ConfigError(
            f"{path} exists and is not a report of localrl, so it is left alone. Choose another "
            "place with --out."
        )


def _data(sampled: ReportGroups, drawings: Sequence[Drawing]) -> str:
    """Return the script's data, as JSON that no HTML reader takes for markup."""
    return markup_free(
        {"groups": sampled.groups, "charts": [_numbers(drawing.chart) for drawing in drawings]}
    )


def _numbers(chart: Chart) -> dict[str, Any]:
    """Return the numbers of a chart by column: one number, or the lowest and highest of several."""
    parts = columns(len(chart.steps))
    return {
        "title": chart.title,
        "steps": [_ends(chart.steps[part.start], chart.steps[part.stop - 1]) for part in parts],
        "lines": [
            [
                _ends(*sorted(_digits(line.values[at]) for at in (ends[0], ends[-1])))
                if (ends := extremes(line.values, part))
                else None
                for part in parts
            ]
            for line in chart.lines
        ],
    }


def _ends(low: float, high: float) -> float | list[float]:
    return low if low == high else [low, high]


def _digits(value: float | None) -> float:
    return float(f"{value or 0.0:.6g}")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _cards(sampled: ReportGroups) -> list[dict[str, Any]]:
    """Return the best, a typical and the worst completion of the last step shown."""
    last = max((group["step"] or 0 for group in sampled.groups), default=0)
    found = [
        (place, group, leaf)
        for place, group in enumerate(sampled.groups)
        if group["step"] == last
        for leaf in range(len(group["leaves"]))
    ]
    rewards = [group["leaves"][leaf]["r"] for _, group, leaf in found]
    return [
        {"name": name, "place": found[i][0], **_card(found[i][1], found[i][2])}
        for name, i in best_middle_worst(rewards)
    ]


def _asked(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the last message before the model's turn, which the prompt may begin."""
    others = [message for message in messages if message.get("role") != "assistant"]
    return str(others[-1].get("content") or "") if others else ""


def _card(group: Mapping[str, Any], leaf: int) -> dict[str, Any]:
    end, path = group["leaves"][leaf], []
    node = end["n"]
    while 0 <= node < len(group["nodes"]) and node not in path:
        path.append(node)
        node = group["nodes"][node]["p"]
    pieces = [str(t) for n in reversed(path) for t in group["nodes"][n].get("t", ())]
    return {
        "prompt": printable(_asked(group["messages"])),
        "text": printable(end.get("v") or "".join(pieces)),
        "reward": end["r"],
        "step": group["step"],
    }


def _bar(score: Score) -> dict[str, Any]:
    low, high = score.interval or (0.0, 0.0)
    return {
        "score": score,
        "x": round(100 * low, 1),
        "width": round(100 * (high - low), 1),
        "dot": round(100 * (score.pass_at_1 or 0.0), 1),
    }


def _last_step(run: Run) -> list[tuple[str, str, str]]:
    if not run.steps:
        return []
    return [
        (one_line(key), facts.with_unit(key, value), facts.meaning(key)[1])
        for key, value in list(run.steps[-1].items())[:MOST_ROWS]
    ]


def _event(event: Mapping[str, Any]) -> tuple[str, str, str]:
    told = {key: value for key, value in event.items() if key not in ("time", "kind")}
    time, kind = str(event.get("time", "")), str(event.get("kind", ""))
    return one_line(time, 40), one_line(kind, 60), one_line(to_json(told).decode(), 1000)


def _template() -> jinja2.Template:
    kinds = {"line": one_line, "text": printable, "number": facts.number}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= kinds
    return environment.from_string(_file("page.html"))


def _file(name: str) -> str:
    return resources.files("localrl.report").joinpath(name).read_text(encoding="utf-8")
