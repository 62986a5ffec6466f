"""The checks of `localrl doctor` on how a model reads and writes text: tokenizer and template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from localrl.diagnostics.doctor_machine import CheckResult
from localrl.errors import LocalRLError
from localrl.policy.prompt_format import SYSTEM, after_turn
from localrl.policy.roundtrip import find_faults
from localrl.policy.tokenizer import Tokenizer, rendered_turns

EXAMPLE = ({"role": "user", "content": "What is 2 + 3?"},)


def tokenizer_row(tokenizer: Tokenizer, folder: Path) -> CheckResult:
    """Check that text comes back from the tokenizer as it was."""
    faults = find_faults(tokenizer, folder)
    if not faults:
        return CheckResult("tokenizer", "ok", "text comes back as it was")
    lost = any(fault.loses_text for fault in faults)
    told = "; ".join(fault.text for fault in faults)
    mend = "see whether model_type and tokenizer_class in the folder are right"
    return CheckResult("tokenizer", "fail" if lost else "warn", told, mend)


def template_rows(tokenizer: Tokenizer) -> Iterator[CheckResult]:
    """Show how a prompt is made and which tokens end a turn."""
    if tokenizer.joins:
        begin = "".join(tokenizer.pieces(tokenizer.begin_ids))
        text = "no chat template: messages are joined with newlines"
        mend = "this is a base model: use tasks whose prompts are plain text"
        yield CheckResult("template", "warn", text + (f" after {begin!r}" if begin else ""), mend)
        yield CheckResult("end_of_turn", "ok", _ends(tokenizer))
        return
    row, text = _try_template(tokenizer)
    yield row
    if text is None:
        return
    yield end_row(tokenizer)
    count = len(tokenizer.encode_prompt_text(text))
    yield CheckResult("prompt", "ok", f"{text!r} ({count} tokens)")


def end_row(tokenizer: Tokenizer) -> CheckResult:
    """Show the tokens that end a turn, and compare them with what the template writes there."""
    text = _ends(tokenizer)
    if tokenizer.unnamed:
        end = tokenizer.pieces([tokenizer.rendered_end or 0])[0]
        text += f"; {end!r} is only found in the template, the configuration does not name it"
    after = after_turn(rendered_turns(tokenizer)[0]).strip()
    if after and tokenizer.end_ids.isdisjoint(tokenizer.encode_text(after)[:1]):
        mend = "name the text with rollout.stop_text, or a token with model.end_tokens"
        text += f", but the template ends a turn with {after[:40]!r}"
        return CheckResult("end_of_turn", "warn", text, mend)
    if not after and tokenizer.rendered_end is None:
        mend = "look at a few completions: if they go on after the answer, name what should end "
        mend += "them with model.end_tokens or rollout.stop_text"
        text += ", but no end was found by rendering a turn"
        return CheckResult("end_of_turn", "warn", text, mend)
    return CheckResult("end_of_turn", "ok", text)


def _ends(tokenizer: Tokenizer) -> str:
    names = ", ".join(repr(tokenizer.pieces([token])[0]) for token in sorted(tokenizer.end_ids))
    return f"a completion ends with {names}"


def _try_template(tokenizer: Tokenizer) -> tuple[CheckResult, str | None]:
    """Render an example, with a system message if the template demands one."""
    try:
        text = tokenizer.render(EXAMPLE)
        return CheckResult("template", "ok", "rendered in a process with limits"), text
    except LocalRLError as error:
        refused = str(error)
    try:
        text = tokenizer.render((SYSTEM, *EXAMPLE))
    except LocalRLError:
        mend = "use another model, or fix its chat_template"
        return CheckResult("template", "fail", refused, mend), None
    told = "rendered only with a system message"
    return CheckResult("template", "warn", told, "set task.system, or give rows a `system`"), text
