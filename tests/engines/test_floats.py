"""`model.dtype`: what it casts, when float16 is taken, and when a model stays what it was."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from localrl.backend import mx, tree_flatten
from localrl.config import RunConfig
from localrl.engines.choose import choose_engine
from localrl.engines.open import make_policy
from localrl.errors import ConfigError
from localrl.memory.machine import mac
from localrl.memory.sizes import read_sizes
from localrl.policy.model import load_model
from localrl.training.memory_plan import plan_request
from localrl.training.resolved import resolve

PROMPTS = ((5, 9, 30, 7), (41, 12, 6))


def stored(folder, *, large=1.0, **changes):
    """A model stored in bfloat16, with an embedding that many times as large."""
    made = tiny.make_folder(folder, **changes)
    file = str(made / "model.safetensors")
    arrays = {
        name: array.astype(mx.bfloat16) if mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in mx.load(file).items()
    }
    for name, array in arrays.items():
        if "embed_tokens" in name and array.dtype == mx.bfloat16:
            arrays[name] = array * large
    mx.eval(arrays)
    mx.save_safetensors(file, arrays)
    return made


def opened(folder, dtype, *, for_cpu=False, **options):
    return make_policy(
        load_model(folder), rank=2, scale=1.0, seed=0, for_cpu=for_cpu, dense=False, dtype=dtype,
        prompts=PROMPTS, **options,
    )  # fmt: skip


def kinds(policy):
    """Dtypes of the base's floats."""
    return {
        array.dtype
        for name, array in tree_flatten(policy.model.parameters())
        if mx.issubdtype(array.dtype, mx.floating) and "lora" not in name
    }


@pytest.mark.parametrize("for_cpu", [True, False])
@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp16", mx.float16), ("bf16", mx.bfloat16), ("fp32", mx.float32)]
)
def test_an_explicit_format_is_taken_everywhere(tmp_path, dtype, kind, for_cpu):
    policy = opened(stored(tmp_path / "model"), dtype, for_cpu=for_cpu)
    assert kinds(policy) == {kind}
    assert (policy.floats.dtype, policy.floats.reason) == (dtype, "as set")
    assert choose_engine(policy).engine.name == "mlx"


def test_the_cpu_computes_float32_unasked(tmp_path):
    policy = opened(stored(tmp_path / "model"), "auto", for_cpu=True)
    assert kinds(policy) == {mx.float32}
    assert policy.floats.dtype == "fp32"


@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "lfm2"])
def test_a_gpu_casts_bfloat16_to_float16(tmp_path, family, bits):
    policy = opened(stored(tmp_path / "model", bits=bits, **tiny.FAMILIES[family]), "auto")
    assert kinds(policy) == {mx.float16}
    assert policy.floats.dtype == "fp16"
    assert policy.floats.reason.endswith(" is the largest hidden state of a trial")
    weights, hidden = policy.checks
    assert (weights.name, hidden.name) == ("float16_weights", "float16_range")
    # Gemma adds 1 to the weights of its norms, in their dtype.
    assert weights.value < (1e-2 if family == "gemma3_text" else 1e-5)
    assert 0 < hidden.value < 1000
    trained = {name for name, _ in tree_flatten(policy.model.trainable_parameters())}
    assert all("lora" in name for name in trained)


@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize(
    ("large", "tied", "reason"),
    [
        (1e30, False, "weights are too small or too large"),
        (1e-6, False, "weights are too small or too large"),
        (1e5, False, "hidden states of 3.74e+04 are too large"),
        (4e4, True, "logits or gradients are not finite"),
    ],
)
def test_what_float16_cannot_hold_stays_as_it_is_stored(tmp_path, bits, large, tied, reason):
    folder = stored(tmp_path / "model", large=large, bits=bits, tie_word_embeddings=tied)
    policy = opened(folder, "auto")
    assert policy.floats.dtype == "bf16"
    assert policy.floats.reason.startswith("as stored; ")
    assert reason in policy.floats.reason
    assert policy.checks == []
    before = dict(tree_flatten(load_model(folder).model.parameters()))
    after = {
        name.replace(".linear.", "."): array
        for name, array in tree_flatten(policy.model.parameters())
        if "lora" not in name
    }
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[name], before[name]).item() for name in before)


def test_other_models_stay_as_they_are_on_a_gpu(tmp_path):
    policy = opened(tiny.make_folder(tmp_path / "model"), "auto")
    assert kinds(policy) == {mx.float32}
    assert policy.floats.reason == "as stored"


def test_float16_that_overflows_is_refused_where_it_is_set(tmp_path):
    policy = opened(stored(tmp_path / "model", large=1e30), "fp16")
    assert policy.checks[0].value == np.inf
    with pytest.raises(ConfigError, match=r"model\.dtype is fp16.*float16_range found inf"):
        choose_engine(policy, "mlx")
    told: list[str] = []
    choose_engine(policy, "mlx", told.append, selfcheck="warn")
    assert "Set model.dtype to auto or bf16" in told[0]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_cpu_engine_computes_float32_alone(tiny_folder, dtype):
    settings = {"model.path": str(tiny_folder), "model.engine": "cpu", "model.dtype": dtype}
    with pytest.raises(ConfigError, match=f"computes float32 only, but model.dtype is {dtype}"):
        resolve(RunConfig.create(settings))


@pytest.mark.parametrize(("dtype", "size"), [("auto", 2), ("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_the_plan_knows_the_size_of_a_float(dtype, size):
    config = RunConfig.create({"model.path": "some", "model.dtype": dtype})
    sizes = read_sizes(tiny.CONFIG)
    on_mac = plan_request(config, sizes, mac(16)).workloads
    assert {workload.float_bytes for workload in on_mac.values()} == {size}
