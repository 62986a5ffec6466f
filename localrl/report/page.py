"""The report: one HTML file that needs no network and never treats model text as markup.

Jinja escapes everything it writes; completions travel as JSON without a `<` and enter the page only
as text nodes. A content security policy allows the script and the styles in the file, by their
hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from localrl.errors import ConfigError
from localrl.report import facts
from localrl.report.charts import draw
from localrl.report.curves import Chart, charts
from localrl.report.reading import Run, Score
from localrl.report.samples import ReportGroups, best_middle_worst, markup_free, sample
from localrl.runs.logs import to_json, write_atomic
from localrl.utils.text import one_line, printable

GROUP_BYTES = 3_000_000
"""Size limit of the groups in a report; with everything else it stays below 5 MB."""
MOST_ROWS = 200
"""Most rows in the tables of events, evaluations and metrics; the last ones of the first two."""
SCRIPTS = ("page.js", "page-groups.js", "page-tree.js")
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


def make_page(run: Run, sampled: ReportGroups) -> str:
    """Render the HTML of a report."""
    styles, script = _file("page.css"), "\n".join(map(_file, SCRIPTS))
    shown = charts(run)
    return _template().render(
        run=run,
        name=one_line(run.path.resolve().name),
        now=datetime.now(UTC).isoformat(" ", "minutes").removesuffix("+00:00"),
        styles=styles,
        script=script,
        policy=_policy(styles, script),
        mark=MARK,
        data=_data(run, sampled, shown),
        drawings=[draw(chart) for chart in shown],
        sampled=sampled,
        note=groups_note(sampled),
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


def _data(run: Run, sampled: ReportGroups, shown: list[Chart]) -> str:
    """Return the script's data, as JSON that no HTML reader takes for markup."""
    values = {
        "groups": sampled.groups,
        "charts": [
            {
                "steps": chart.steps,
                "lines": [[_digits(value) for value in line.values] for line in chart.lines],
            }
            for chart in shown
        ],
    }
    return markup_free(values)


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _policy(styles: str, script: str) -> str:
    return (
        f"default-src 'none'; style-src '{_hash(styles)}'; script-src '{_hash(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


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


def _card(group: Mapping[str, Any], leaf: int) -> dict[str, Any]:
    end, path = group["leaves"][leaf], []
    node = end["n"]
    while 0 <= node < len(group["nodes"]) and node not in path:
        path.append(node)
        node = group["nodes"][node]["p"]
    pieces = [str(t) for n in reversed(path) for t in group["nodes"][n].get("t", ())]
    return {
        "prompt": printable(group["messages"][-1]["content"] if group["messages"] else ""),
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
    kinds = {"line": one_line, "number": facts.number}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= kinds
    return environment.from_string(_file("page.html"))


def _file(name: str) -> str:
    return resources.files("localrl.report").joinpath(name).read_text(encoding="utf-8")
