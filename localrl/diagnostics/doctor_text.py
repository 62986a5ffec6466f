"""The checks of `localrl doctor` on how a model reads and writes text: tokenizer and template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from localrl.diagnostics.doctor_machine import CheckResult
from localrl.errors import LocalRLError
from localrl.policy.prompt_format import EXCHANGE, STAND_IN
from localrl.policy.roundtrip import find_faults
from localrl.policy.tokenizer import Tokenizer

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
        yield end_row(tokenizer, "")
        return
    try:
        text = tokenizer.render(EXAMPLE)
    except LocalRLError as error:
        mend = "use another model, or fix its chat_template"
        yield CheckResult("template", "fail", str(error), mend)
        return
    yield CheckResult("template", "ok", "rendered in a process with limits")
    yield end_row(tokenizer, _after_a_turn(tokenizer))
    count = len(tokenizer.encode_prompt_text(text))
    yield CheckResult("prompt", "ok", f"{text!r} ({count} tokens)")


def end_row(tokenizer: Tokenizer, after: str) -> CheckResult:
    """Show the tokens that end a turn. after: what the template writes after one."""
    names = ", ".join(repr(tokenizer.pieces([token])[0]) for token in sorted(tokenizer.end_ids))
    text = f"a completion ends with {names}"
    if tokenizer.unnamed:
        end = tokenizer.pieces([tokenizer.rendered_end or 0])[0]
        text += f"; {end!r} is only found in the template, the configuration does not name it"
    if tokenizer.rendered_end is None and after.strip():
        mend = "name the text with rollout.stop_text, or a token with model.end_tokens"
        text += f", but the template ends a turn with {after.strip()[:40]!r}"
        return CheckResult("end_of_turn", "warn", text, mend)
    return CheckResult("end_of_turn", "ok", text)


def _after_a_turn(tokenizer: Tokenizer) -> str:
    """Return what the template writes after a turn; nothing if it cannot render one."""
    try:
        text = tokenizer.render(EXCHANGE, add_generation_prompt=False)
    except LocalRLError:
        return ""
    return text.rpartition(STAND_IN)[2] if STAND_IN in text else ""
