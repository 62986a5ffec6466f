"""docs/benchmarks.md and its picture, from the results of `side_by_side.py` and `to_target.py`.

python benchmarks/side_by_side_page.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from localrl.runs.logs import read_jsonl

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
TITLES = {"short": "A prompt of 20 tokens", "long": "A prompt of 500 tokens"}
AIMS = (
    ("short", True, "TRL", 1.5),
    ("short", False, "the fastest MLX tool", 15.0),
    ("short", True, "the fastest MLX tool", 3.0),
    ("long", True, "TRL", 4.0),
)
"""Job, whether all have one BLAS, beside whom, and how many times as fast as they."""
OWN = ("localrl", "TRL")
"""They bring a BLAS of their own, and stand in both tables."""


@dataclass(frozen=True)
class Line:
    """One tool on one job, over all rounds."""

    tool: str
    step_s: float
    """Median of all steps after each process's first."""
    low_s: float
    high_s: float
    """Of the rounds' medians."""
    times_ours: float
    """Ratio to localrl's median over the rounds in which both were measured."""
    tokens_per_s: float
    peak_bytes: float
    rounds: int
    counts: dict[str, int]
    problem: str | None


def read(path: Path) -> list[dict[str, Any]]:
    """All results, or none."""
    return list(read_jsonl(path)) if path.exists() else []


def lines(results: list[dict[str, Any]], job: str, blas: bool) -> list[Line]:
    """The table of a job, the fastest first: all tools as installed, or with one BLAS."""
    wanted = [r for r in results if r["job"] == job and (r["blas"] == blas or r["tool"] in OWN)]
    tools = dict.fromkeys(r["tool"] for r in wanted)
    ours = [r for r in wanted if r["tool"] == "localrl"]
    found = [_line(tool, [r for r in wanted if r["tool"] == tool], ours) for tool in tools]
    return sorted(found, key=lambda line: line.step_s)


def _line(tool: str, runs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> Line:
    good = [run for run in runs if len(run["seconds"]) > 1]
    if not good:
        nothing = float("nan")
        problem = runs[0]["problem"] or "it ended after one step"
        return Line(tool, float("inf"), *[nothing] * 5, 0, {}, problem)
    medians = [median(run["seconds"][1:]) for run in good]
    step_s = _step_s(good)
    together = [[r for r in some if r["round"] in _rounds(good, ours)] for some in (good, ours)]
    tokens = median(t for run in good for t in run["tokens"])
    return Line(
        tool,
        step_s,
        min(medians),
        max(medians),
        _step_s(together[0]) / _step_s(together[1]),
        tokens / step_s,
        median(run["peak_bytes"] for run in good),
        len(good),
        good[0]["counts"][-1] if good[0]["counts"] else {},
        None,
    )


def _step_s(runs: list[dict[str, Any]]) -> float:
    """Median of all steps after each process's first; NaN without any."""
    steps = [s for run in runs for s in run["seconds"][1:]]
    return median(steps) if steps else float("nan")


def _rounds(*tools: list[dict[str, Any]]) -> set[int]:
    """Those in which all of them have steps that count."""
    return set.intersection(*({r["round"] for r in runs if r["seconds"][1:]} for runs in tools))


def table(found: list[Line]) -> str:
    """Markdown; ratios are to localrl."""
    ours = next(line for line in found if line.tool == "localrl")
    rows = [
        "| tool | seconds a step | times ours | medians of rounds | tokens/s | MiB | times ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in found:
        if line.problem:
            rows.append(f"| {line.tool} | failed: {line.problem} | | | | | |")
            continue
        rows.append(
            f"| {line.tool} | {line.step_s:.2f} | {line.times_ours:.2f} "
            f"| {line.low_s:.2f} to {line.high_s:.2f} ({line.rounds}) | {line.tokens_per_s:.0f} "
            f"| {line.peak_bytes / 2**20:.0f} | {line.peak_bytes / ours.peak_bytes:.2f} |"
        )
    return "\n".join(rows)


def sentence(found: list[Line]) -> str:
    """What a table says, in one line."""
    by_tool = {line.tool: line for line in found if not line.problem}
    if by_tool.pop("localrl", None) is None:
        return "localrl was not measured."
    said = []
    if trl := by_tool.pop("TRL", None):
        said.append(f"TRL's step takes {trl.times_ours:.1f} times as long as localrl's")
    if by_tool:
        best = min(by_tool.values(), key=lambda line: line.times_ours)
        said.append(f"the fastest MLX tool's ({best.tool}) {best.times_ours:.1f} times as long")
    return "; ".join(said) + "." if said else ""


def aims(results: list[dict[str, Any]]) -> str:
    """What localrl set out to reach, and what was reached."""
    rows = ["| aim | reached |", "|---|---|"]
    for job, blas, rival, aim in AIMS:
        found = {line.tool: line for line in lines(results, job, blas) if not line.problem}
        ours = found.pop("localrl", None)
        own = [line for line in found.values() if (line.tool == "TRL") == (rival == "TRL")]
        if ours is None or not own:
            continue
        ratio = min(line.times_ours for line in own)
        with_blas = "" if rival == "TRL" else ", one BLAS" if blas else ", as installed"
        what = f"{TITLES[job].lower()}{with_blas}: {aim:g} times as fast as {rival}"
        rows.append(f"| {what} | {ratio:.2f}{'' if ratio >= aim else ', not reached'} |")
    for job in TITLES:
        found = sorted(lines(results, job, True), key=lambda line: line.peak_bytes)
        first = next((line.tool for line in found if not line.problem), None)
        if first is None:
            continue
        told = "yes" if first == "localrl" else f"not reached: {first} takes less"
        rows.append(f"| {TITLES[job].lower()}: the least memory | {told} |")
    return "\n".join(rows)


def counted(results: list[dict[str, Any]]) -> str:
    """Forward calls and positions of one step, as each tool's process has counted them."""
    rows = ["| tool | prompt | in a step |", "|---|---|---|"]
    seen = set()
    for run in results:
        key = (run["tool"], run["job"])
        if key in seen or not run["counts"] or not run["counts"][-1]:
            continue
        seen.add(key)
        told = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in run["counts"][-1].items())
        rows.append(f"| {run['tool']} | {run['job']} | {told} |")
    return "\n".join(rows)


def versions(results: list[dict[str, Any]]) -> str:
    """What was installed."""
    found: dict[str, dict[str, str]] = {}
    for run in results:
        if run["versions"]:
            found[run["tool"]] = run["versions"]
    return "\n".join(
        f"- {tool}: {', '.join(f'{name} {number}' for name, number in numbers.items())}"
        for tool, numbers in found.items()
    )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Seconds a step, as points on a logarithmic axis, with the range of the rounds' medians."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator

    jobs = [job for job in TITLES if any(r["job"] == job for r in results)]
    figure, axes = pyplot.subplots(
        1, len(jobs), figsize=(5 * len(jobs), 3.4), constrained_layout=True, squeeze=False
    )
    for job, place in zip(jobs, axes[0], strict=True):
        bars = [(line, "") for line in lines(results, job, True)]
        bars += [
            (line, ", as installed") for line in lines(results, job, False) if line.tool not in OWN
        ]
        bars = [(line, note) for line, note in bars if not line.problem][::-1]
        names = [line.tool + note for line, note in bars]
        for name, (line, _) in zip(names, bars, strict=True):
            colour = "C0" if line.tool == "localrl" else "0.35"
            place.plot([line.low_s, line.high_s], [name, name], color=colour, linewidth=2)
            place.plot(line.step_s, name, "o", color=colour)
            place.annotate(
                f"{line.step_s:.2f}", (line.step_s, name), (0, 6), textcoords="offset points",
                ha="center", fontsize=8, color=colour,
            )  # fmt: skip
        place.set(
            xscale="log", xlim=(0.4, 40), xlabel="seconds a step, each gridline twice the last",
            title=TITLES[job],
        )  # fmt: skip
        ticks = [0.5 * 2**n for n in range(7)]
        place.xaxis.set_major_locator(FixedLocator(ticks))
        place.xaxis.set_minor_locator(NullLocator())
        place.set_xticklabels([f"{tick:g}" for tick in ticks])
        place.margins(y=0.12)
        place.grid(axis="x", alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def page(results: list[dict[str, Any]], about: dict[str, Any], rest: Iterable[str]) -> str:
    """The whole document."""
    loads = [run["load"] for run in results]
    parts = [
        f"""# localrl beside other tools

The same random Qwen3 (7.3 million weights, 8 layers, 256 wide, vocabulary 4,096), the same prompts,
8 completions of 64 tokens of one prompt in a step, the same reward, LoRA of rank 8 on all linear
layers, Adam, float32. Every measurement is a process of its own, with nothing else running; the
tools take turns over the rounds, of which some hold localrl and TRL alone. "Seconds a step" is the
median of all steps after each process's first; "times ours" is the ratio to localrl's median in the
rounds that both were in, for the machine's speed changes from hour to hour. "MiB" is the median
over rounds of the most resident memory that a process and its children held together, imports
included.

Measured on: {about["machine"]}, {about["cores"]} cores, {about["started"]}; load average when a
measurement began {min(loads):.1f} to {max(loads):.1f}.
Made by `benchmarks/side_by_side.py`; nothing here was measured on a Mac.

![Seconds a step](benchmarks.png)""",
    ]
    for job, title in TITLES.items():
        for blas, note in ((True, "every MLX tool with localrl's BLAS"), (False, "as installed")):
            found = lines(results, job, blas)
            if found:
                parts.append(f"## {title}, {note}\n\n{sentence(found)}\n\n{table(found)}")
    parts.append(
        "MLX's wheel for Linux multiplies matrices with the reference BLAS. The tables with one "
        "BLAS are\nthe ones to quote; on a Mac all MLX tools have the same one anyway.\n\n"
        f"## What was aimed at\n\n{aims(results)}\n\n"
        "What the time and the memory go to stands at the end of this page.\n\n"
        f"## Forward calls\n\n{counted(results)}"
        f"\n\n## Versions\n\n{versions(results)}"
    )
    return "\n\n".join([*parts, *rest]) + "\n"


def decoding() -> Iterable[str]:
    """What `decode.py` has found, where it has been run."""
    if not (HERE / "decode.json").is_file():
        return
    told = json.loads((HERE / "decode.json").read_text())
    rows = ["| rows | tokens/s | the bare loop | ratio |", "|---|---|---|---|"]
    rows += [
        f"| {rate['rows']} | {rate['tokens_per_s']:.0f} | {rate['bare_tokens_per_s']:.0f} "
        f"| {rate['ratio']:.1f} |"
        for rate in told["rates"]
    ]
    yield f"""## Decoding

The same model, 64 tokens behind 20, beside a bare loop in the same process, in turn with it:
mlx-lm's model and `mx.random.categorical`, one call a token, no log-probability, no end, and
localrl's BLAS. Made by `benchmarks/decode.py`.

{chr(10).join(rows)}"""
    if (HERE / "decode_long.json").is_file():
        told = json.loads((HERE / "decode_long.json").read_text())["fit"]
        fit = f"{told['a_ms']:.1f} ms {1e3 * told['b_ms']:+.0f} us x rows"
        fit += f" {1e3 * told['c_ms']:+.1f} us x rows x tokens before it"
        yield f"""![Time of a token over its place](decode.png)

Up to 64 rows and 2,048 tokens, from `decode.py --rows 1,4,16,64 --tokens 2048 --plot`. Dotted:
{fit}, fitted to all four,
{100 * told["residual"]:.0f} % from what was measured (root mean square). `localrl bench` fits
your machine."""


def kernels() -> Iterable[str]:
    """Kernels of a decode step on a GPU, as `launches.py` has counted them."""
    told = json.loads((HERE / "launches.json").read_text())
    rows = ["| a step of | kernels before | now | times the model alone |", "|---|---|---|---|"]
    rows += [
        f"| {name} | {was:,} | {told['now'][name]:,} "
        f"| {told['now'][name] / told['now']['model']:.2f} |"
        for name, was in told["before"].items()
    ]
    yield f"""## Kernels of a decode step on a GPU

Counted in the graph of a Llama of 30 blocks in 4 bits and float16, with the draw, without a GPU:
each operation is one kernel, views are none, and so are copies that a kernel makes of an input
which is not contiguous (with shared prompts about five more in a block). Before: every adapter
cast for every token and computed on its own; attention to prompt and tail under two softmaxes.
Now: adapters cast once per update, products that layers with one input have in common computed
once. How fast that is on a Mac nobody has measured; on the CPU the engine decodes the model
above, with adapters, 1.06 to 1.25 times as fast as before at 1 row (medians of three series of 12
to 25 alternating pairs) and 1.21 times at 16, to the same tokens; SmolLM2-135M 1.20 and 1.13
times (8 pairs), with log-probabilities equal to 1e-5. Made by `benchmarks/launches.py`.

{chr(10).join(rows)}"""


def profiles() -> Iterable[str]:
    """Where the time goes, as `localrl bench --profile` has told."""
    files = [HERE / name for name in ("profile.txt", "profile_long.txt")]
    told = [f"```\n{file.read_text().rstrip()}\n```" for file in files if file.is_file()]
    if told:
        yield f"""## Where localrl's time goes

Reading the weights (29 MB) once for every token is the floor of decoding: those are 33 matrix
products, then attention to what came before and the start of many small operations. In the update
all but the products of many columns is in C, on both cores. Of the memory, 90 MiB
are Python, NumPy, MLX and mlx-lm, 40 MiB two child processes (rewards, templates); then come the
weights, twice while rows are decoded, and what an update keeps, which `memory.micro_rows` makes
smaller.

`localrl bench --rows 8 --tokens 64 --repeats 9 --profile`, with prompts of 20 and of 500 tokens:

{(chr(10) * 2).join(told)}"""


def write_page() -> None:
    """Read the results, write the page and the picture."""
    results = read(HERE / "side_by_side.jsonl")
    about = json.loads((HERE / "side_by_side.machine.json").read_text())
    draw(results, DOCS / "benchmarks.png")
    rest = []
    if (HERE / "to_target.jsonl").is_file():
        from to_target import section

        rest = [section(read(HERE / "to_target.jsonl"))]
    rest += [*decoding(), *kernels(), *profiles()]
    (DOCS / "benchmarks.md").write_text(page(results, about, rest), encoding="utf-8")


if __name__ == "__main__":
    write_page()
