"""The page: nothing that a model, a user or a task wrote becomes markup; small, offline, polite."""

from __future__ import annotations

import json
from collections import Counter
from html.parser import HTMLParser

import pytest

from localrl.errors import ConfigError
from localrl.report.charts import draw, tick_text
from localrl.report.curves import Chart, Line, charts
from localrl.report.page import GROUP_BYTES, groups_note, make_page, write_report
from localrl.report.reading import read_run
from localrl.report.samples import sample

EVIL = (
    "</title></script></pre></td>\"'><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J"
)

DRAWN = {"polyline", "circle", "line", "text", "svg", "span", "b"}
"""Of charts and their keys: one more reward function has some more of them."""


class Elements(HTMLParser):
    """Counts elements, and keeps attributes that name a place or run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.places: list[str | None] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found[tag] += 1
        self.places += [
            value for name, value in attrs if name in ("src", "href") or name.startswith("on")
        ]
        assert "style" not in dict(attrs)


def page_of(folder):
    return make_page(read_run(folder), sample(folder, GROUP_BYTES))


def test_hostile_text_makes_no_element(run_copy):
    harmless = Elements(page_of(run_copy))
    settings = (run_copy / "config.toml").read_text()
    (run_copy / "config.toml").write_text(
        settings.replace('name = "sums"', f"name = {json.dumps(EVIL)}")
    )
    lines = (run_copy / "metrics.jsonl").read_text().splitlines()
    step = next(i for i, line in enumerate(lines) if '"reward"' in line)
    renamed = json.loads(lines[step]) | {f"rewards/{EVIL}/mean": 0.5}
    lines[step] = json.dumps(renamed)
    (run_copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    events = (run_copy / "events.jsonl").read_text().splitlines()
    events[0] = json.dumps({"time": EVIL, "kind": EVIL, EVIL: EVIL})
    (run_copy / "events.jsonl").write_text("\n".join(events) + "\n")
    groups = [json.loads(line) for line in (run_copy / "rollouts.jsonl").open()]
    for group in groups:
        group["example"] = EVIL
        group["messages"][0]["content"] += EVIL
        group["nodes"][0]["pieces"][0] = EVIL
        group["leaves"][0]["parts"] = {EVIL: 1.0}
    (run_copy / "rollouts.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    page = page_of(run_copy)
    hostile = Elements(page)
    assert {k: n for k, n in hostile.found.items() if k not in DRAWN} == {
        k: n for k, n in harmless.found.items() if k not in DRAWN
    }
    assert set(hostile.found) == set(harmless.found)
    assert hostile.found["script"] == 2
    assert hostile.found["img"] == 0
    assert hostile.places == ["data:,"]
    assert "\x1b" not in page
    assert "alert(1)&lt;/script" in page


def test_the_data_read_back(tree_run):
    page = page_of(tree_run)
    block = page.split('id="data">')[1].split("</script>")[0]
    data = json.loads(block)
    texts = [t for group in data["groups"] for node in group["nodes"] for t in node["t"]]
    assert {"</script>", "\x1b[31m", "<!--", "\u202e"} <= set(texts)
    assert len(data["groups"]) == 16
    assert all(len(c["steps"]) == len(line) for c in data["charts"] for line in c["lines"])


def test_the_report_reads_the_folder_alone_and_leaves_it_as_it_is(run_copy):
    before = {p: p.stat().st_mtime_ns for p in run_copy.rglob("*") if p.is_file()}
    write_report(read_run(run_copy), run_copy / "report.html")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert {p for p in run_copy.rglob("*") if p.is_file()} - set(before) == {
        run_copy / "report.html"
    }


def test_a_long_run_stays_small_and_says_what_it_shows(run_copy):
    groups = [json.loads(line) for line in (run_copy / "rollouts.jsonl").open()]
    for group in groups:
        group["messages"][0]["content"] = "<&" * 2000  # six bytes each where nothing is markup
    (run_copy / "rollouts.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups) * 20)
    metrics = [json.loads(line) for line in (run_copy / "metrics.jsonl").open()]
    step = next(line for line in metrics if "reward" in line)
    score = next(line for line in metrics if "eval/n" in line)
    with (run_copy / "metrics.jsonl").open("a") as file:
        for n in range(3, 3003):
            file.write(json.dumps(step | {"step": n}) + "\n")
            if n % 10 == 0:
                file.write(json.dumps(score | {"step": n}) + "\n")
    with (run_copy / "events.jsonl").open("a") as file:
        file.write((json.dumps({"kind": "noise", "text": "x" * 5000}) + "\n") * 300)
    written = write_report(read_run(run_copy), run_copy / "report.html")
    size = (run_copy / "report.html").stat().st_size
    assert 2_500_000 < size == written.size < 5_000_000
    page = (run_copy / "report.html").read_text()
    assert "of the 320 groups of rollouts.jsonl" in written.words
    assert written.words in page
    assert "Drawn over every 10 steps from their lowest to their highest value." in page
    assert "Evaluations, the last 200 of 302" in page


def test_a_run_without_anything_has_a_page(run_copy):
    for path in run_copy.iterdir():
        if path.name != "run.json" and path.is_file():
            path.unlink()
    page = page_of(run_copy)
    assert "No steps yet." in page
    assert "No evaluation yet." in page
    assert groups_note(sample(run_copy, 1)) == "no groups yet"


def test_no_other_file_is_written_over(run_copy):
    mine = run_copy / "mine.html"
    mine.write_text("<html>my own</html>")
    with pytest.raises(ConfigError, match="is not a report of localrl"):
        write_report(read_run(run_copy), mine)
    assert mine.read_text() == "<html>my own</html>"
    for _ in range(2):
        write_report(read_run(run_copy), run_copy / "report.html")


def test_a_place_that_cannot_be_written(run_copy):
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(read_run(run_copy), run_copy / "no" / "report.html")


def test_a_drawing_by_hand():
    line = Line("x", (0.0, 2.0, None, 4.0))
    drawing = draw(Chart("t", "", "", (1, 2, 3, 5), (line,), limit=3.0))
    assert drawing.y_ticks == ((156.0, "0"), (119.5, "1"), (83.0, "2"), (46.5, "3"), (10.0, "4"))
    assert [text for _, text in drawing.x_ticks] == ["1", "2", "3", "4", "5"]
    assert (drawing.x_ticks[0][0], drawing.x_ticks[-1][0]) == (46.0, 350.0)
    stroke = drawing.strokes[0]
    assert stroke.paths == ("46.0,156.0 122.0,83.0",)
    assert stroke.dots[-1] == (350.0, 10.0)
    assert stroke.last == 4.0
    assert drawing.limit == 46.5


def test_ticks_have_room():
    shown = [tick_text(tick) for tick in (0.0, 0.25, 7500, 25000, 0.00015, -5e-7)]
    assert shown == ["0", "0.25", "7500", "25k", "1.5e-4", "-5e-7"]


def test_memory_is_drawn_against_its_limit(run_copy):
    plan = json.loads((run_copy / "plan.json").read_text())
    (run_copy / "plan.json").write_text(json.dumps(plan | {"limit_bytes": 512 * 2**20}))
    memory = next(chart for chart in charts(read_run(run_copy)) if chart.title == "Memory")
    assert memory.limit == 512
    assert draw(memory).limit is not None
    assert "limit <b>512</b>" in page_of(run_copy)
