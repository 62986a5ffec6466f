"""What errors say of memory and the GPU."""

from __future__ import annotations

import pytest

from localrl.memory.failures import FAILURES, doubtful, failure_of

WHOLE = {
    "[malloc] Unable to allocate 123 bytes.": "refused",
    "[malloc_or_wait] Unable to allocate 123 bytes.": "refused",
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed "
    "buffer size of 8 bytes.": "refused",
    "[metal::malloc] Resource limit (499000) exceeded.": "poisoned",
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)": "poisoned",
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)": "watchdog",
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
    "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)": "poisoned",
    "[METAL] Command buffer execution failed: Caused GPU Hang Error "
    "(00000003:kIOGPUCommandBufferCallbackErrorHang)": "poisoned",
    "[METAL] Command buffer execution failed: Ignored (for causing prior/excessive GPU errors) "
    "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)": "poisoned",
}


@pytest.mark.parametrize(("text", "kind"), WHOLE.items())
def test_whole_messages(text, kind):
    assert failure_of(RuntimeError(text)) == kind


@pytest.mark.parametrize(("part", "kind"), [row[:2] for row in FAILURES])
def test_every_row_of_the_table(part, kind):
    assert failure_of(RuntimeError(f"before {part} after")) == kind


def test_doubt_weighs_more():
    both = "[malloc] Unable to allocate 1 bytes. Command buffer execution failed"
    assert failure_of(RuntimeError(both)) == "poisoned"


def test_only_a_refusal_leaves_results_to_be_trusted():
    errors = {kind: RuntimeError(text) for text, kind in WHOLE.items()}
    assert {kind: doubtful(error) for kind, error in errors.items()} == {
        "refused": False,
        "poisoned": True,
        "watchdog": True,
    }
    assert not doubtful(RuntimeError("something else"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("something else"),
        RuntimeError("[matmul] Last dimension of first input with shape (2,3) must match"),
        ValueError("[malloc] Unable to allocate 1 bytes."),
        KeyError("Insufficient Memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_say_nothing_of_memory(error):
    assert failure_of(error) is None


def test_python_itself_may_refuse():
    assert failure_of(MemoryError()) == "refused"
