"""The report in a real browser: no error, no request, no sideways scrolling, and it works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from test_live import grow, served
from waiting import DEADLINE_S

from localrl.report.page import write_report
from localrl.report.reading import read_run
from localrl.runs.folder import reopen_run
from localrl.runs.logs import read_jsonl

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)

OWN = "not an origin"

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is there")

LOOK = """<!doctype html><body>
<iframe id=phone src=report.html width=375 height=800></iframe>
<iframe id=desk src=report.html width=1280 height=900></iframe>
<pre id=found></pre><script>
const found = {};
addEventListener("load", () => {
  try {
    for (const frame of document.querySelectorAll("iframe")) found[frame.id] = look(frame);
  } catch (error) { found.error = String(error); }
  document.getElementById("found").textContent = "FOUND" + JSON.stringify(found) + "END";
});
function look(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  const all = (selector) => [...page.querySelectorAll(selector)];
  const colours = () => all("[data-token]").map((span) => span.style.backgroundColor);
  const told = {
    wide: root.scrollWidth, room: root.clientWidth, rows: all("#table tbody tr").length,
    texts: all("script").length, images: all("main img").length,
    charts: all("svg.chart polyline").length,
    bars: [], tokens: [], columns: 0, completions: "",
  };
  for (const [place, row] of all("#table tbody tr").entries()) {
    page.querySelectorAll("#table tbody tr button")[place].click();
    told.bars.push(all("#tree rect").length);
    told.tokens.push(all("[data-token]").length);
    told.completions += page.getElementById("completions").textContent;
    told.wide = Math.max(told.wide, root.scrollWidth);
  }
  const advantage = colours();
  page.querySelector("input[value=e]").click();
  told.recoloured = colours().join() !== advantage.join();
  page.querySelector("input[value=l]").click();
  told.scale = page.getElementById("scale").textContent;
  const boxes = all("#completions article").map((box) => box.getBoundingClientRect().left);
  told.columns = new Set(boxes).size;
  const chart = page.querySelector("svg.chart");
  chart.focus();
  chart.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", { key: "ArrowLeft" }));
  told.at = chart.closest("figure").querySelector(".at").textContent;
  return told;
}
</script>"""


def browse(page: str, folder: Path) -> tuple[str, list[str], list[str]]:
    """The document after its scripts ran, lines on the console, and addresses asked for."""
    log = folder / "net.json"
    done = subprocess.run(
        [
            str(BROWSER),
            *("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--disable-extensions", "--disable-default-apps"),
            # The browser has habits of its own.
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--allow-file-access-from-files",  # so that the looking page may read the report
            "--virtual-time-budget=8000",
            "--enable-logging=stderr",
            f"--log-net-log={log}",
            f"--user-data-dir={folder / 'profile'}",
            page,
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    seen = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = {
        event["url"]
        for event in seen
        # What the browser asks for itself comes from no origin.
        if not event.get("url", "file:").startswith(("file:", "data:"))
        and event.get("initiator", OWN) != OWN
    }
    return done.stdout, console, sorted(asked)


@pytest.fixture(scope="module")
def looked(tree_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    write_report(read_run(tree_run), folder / "report.html")
    (folder / "look.html").write_text(LOOK)
    text, console, asked = browse((folder / "look.html").as_uri(), folder)
    found = re.search(r"FOUND(.*?)END", text, re.DOTALL)
    assert found, text[-2000:]
    unescaped = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(unescaped), console, asked


def test_no_error_and_no_request(looked):
    found, console, asked = looked
    assert "error" not in found
    assert console == []
    assert asked == []


@pytest.mark.parametrize(("frame", "room"), [("phone", 375), ("desk", 1280)])
def test_nothing_scrolls_sideways(looked, frame, room):
    found = looked[0][frame]
    assert room - 20 <= found["room"] <= room
    assert found["wide"] <= found["room"]
    assert found["columns"] > 1 if frame == "desk" else found["columns"] == 1


def test_every_group_opens_as_it_was_logged(looked, tree_run):
    lines = [json.loads(line) for line in (tree_run / "rollouts.jsonl").open()]
    for frame in ("phone", "desk"):
        found = looked[0][frame]
        assert found["rows"] == len(lines) == 16
        # The table is shown from the last step back, groups of a step in their order.
        lines.sort(key=lambda line: -line["step"])
        assert found["bars"] == [tree_bars(line) for line in lines]
        assert found["tokens"] == [path_tokens(line) for line in lines]


def test_what_the_page_does(looked):
    found = looked[0]["desk"]
    assert found["charts"] >= 8
    assert found["recoloured"]
    assert "surprisal" in found["scale"]
    assert found["at"] == "step 1"


def test_hostile_completions_are_text(looked):
    found = looked[0]["desk"]
    assert found["images"] == 0
    assert found["texts"] == 2
    for text in ("</script>", "<img src=x onerror=alert(1)>", "␛[31m", "<!--", "&lt;", "↵", "é"):
        assert text in found["completions"]
    assert "\x1b" not in found["completions"]
    assert "\u202e" not in found["completions"]


def test_these_checks_can_fail(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><link rel=icon href='data:,'>"
        "<img src='http://127.0.0.1:9/never.png'><script>missing()</script>"
    )
    _, console, asked = browse(page.as_uri(), tmp_path)
    assert any("missing is not defined" in line for line in console)
    assert asked == ["http://127.0.0.1:9/never.png"]


def test_a_served_page_follows_the_run_and_asks_its_server_alone(run_copy, tmp_path):
    with served(run_copy) as server, reopen_run(run_copy):
        first = server.page.get

        def once():
            """The page of now; the run goes on behind the first one."""
            answer = first()
            server.page.get = first
            grow(run_copy, 3, 40)
            return answer

        server.page.get = once
        text, console, asked = browse(server.url, tmp_path)
        assert console == []
        assert {urlsplit(url).netloc for url in asked} == {urlsplit(server.url).netloc}
    assert "running, step 40 of 2 done" in text
    assert "Following the run" in text
    last = [*read_jsonl(run_copy / "metrics.jsonl")][-1]
    assert re.search(rf"each step <b data-line=\"0\">{last['reward']:.3f}</b>", text)


def parents(line: dict) -> set[int]:
    return {node["parent"] for node in line["nodes"] if node["parent"] >= 0}


def paths(line: dict) -> list[list[int]]:
    found = []
    for leaf in line["leaves"]:
        path, node = [], leaf["node"]
        while node >= 0:
            path.append(node)
            node = line["nodes"][node]["parent"]
        found.append(path)
    return found


def tree_bars(line: dict) -> int:
    """Nodes on the way to a leaf, where there are forks; 0 for a flat group."""
    return len({node for path in paths(line) for node in path}) if parents(line) else 0


def path_tokens(line: dict) -> int:
    return sum(len(line["nodes"][node]["token_ids"]) for path in paths(line) for node in path)
