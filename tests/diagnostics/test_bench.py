from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from localrl.cli.main import cli
from localrl.diagnostics.bench import (
    BenchRequest,
    decode_once,
    measure_update,
    open_bench,
    parameters,
)
from localrl.diagnostics.bench_fit import fit
from localrl.diagnostics.bench_profile import profile
from localrl.diagnostics.bench_shapes import SHAPES
from localrl.errors import ConfigError


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tiny.make_folder(tmp_path_factory.mktemp("bench") / "model")
    return open_bench(str(folder), 0, BenchRequest((1, 3), 6, 8, 1))


def test_every_token_of_every_row_is_decoded(opened):
    from localrl.diagnostics.bench import sample

    [group] = sample(opened, opened.endless)
    assert [len(completion) for completion in group.completions()] == [8] * 3
    assert len(group.prompt_ids) == 6
    spans = decode_once(opened, 3)
    assert spans.shape == (8,)
    assert (spans > 0).all()


def test_the_update_is_counted(opened):
    rate = measure_update(opened)
    # The prompt but for its last token once, and three completions with that token before each.
    assert rate.positions == 5 + 3 * 8
    assert rate.trained_tokens == 3 * 8
    assert rate.positions_per_s == pytest.approx(29 / rate.update_s)


def test_measuring_leaves_the_model_as_it_is(opened):
    before = {k: np.array(v) for k, v in tiny.tree_flatten(opened.policy.model.parameters())}
    profile(opened)
    for name, array in tiny.tree_flatten(opened.policy.model.parameters()):
        np.testing.assert_allclose(np.array(array), before[name], atol=1e-6, err_msg=name)


def test_the_stages_of_a_step_add_up_to_it(opened):
    found = profile(opened)
    assert sum(stage.seconds for stage in found.stages) == pytest.approx(found.step_s)
    calls = {stage.name: stage.calls for stage in found.stages}
    assert calls["prefill"] == 1
    assert calls["decode: forward"] == 7
    assert calls["decode: sampling"] == 8
    assert {"rewards", "update: head", "update: backward", "logs", "other"} <= set(calls)


@pytest.mark.parametrize("bits", [4, None])
def test_weights_are_counted_as_they_were_before_quantising(tmp_path, bits):
    policy = tiny.make_tiny_policy(tmp_path / "model", bits=bits)
    width, inner, vocabulary = 64, 128, 64
    block = (64 + 32 + 32 + 64) * width + 3 * inner * width + 2 * width + 2 * 16
    assert parameters(policy) == vocabulary * width + 2 * block + width


def test_a_packed_model_is_counted_alike(tmp_path):
    from localrl.engines.open import make_policy
    from localrl.policy.model import load_model

    loaded = load_model(tiny.make_folder(tmp_path / "model"))
    policy = make_policy(loaded, rank=1, scale=1.0, seed=0, for_cpu=True, dense=False)
    block = 192 * 64 + 3 * 128 * 64 + 2 * 64 + 2 * 16
    assert parameters(policy) == 64 * 64 + 2 * block + 64


def test_the_fit_finds_what_the_times_are_made_of():
    # 4 ms + 0.5 ms a row, and 2 us for each row and token before: 33 are there at the first step.
    def seconds(rows):
        return 1e-3 * (4 + 0.5 * rows + 0.002 * rows * (33 + np.arange(63)))

    found = fit({rows: seconds(rows) for rows in (1, 4, 16)}, prompt_tokens=32)
    assert found is not None
    assert found.a_ms == pytest.approx(4)
    assert found.b_ms == pytest.approx(0.5)
    assert found.c_ms == pytest.approx(0.002)
    assert found.residual < 1e-9


def test_no_term_of_the_fit_is_below_nothing():
    found = fit({1: np.full(8, 0.003), 2: np.full(8, 0.0029)}, prompt_tokens=4)
    assert found is not None
    assert found.b_ms == 0
    assert found.a_ms == pytest.approx(2.95, abs=0.01)
    assert 0 < found.residual < 0.02


def test_short_completions_have_no_term_for_their_length():
    found = fit({1: np.full(8, 0.003), 3: np.full(8, 0.005)}, prompt_tokens=4)
    assert found is not None
    assert (found.a_ms, found.b_ms, found.c_ms) == (pytest.approx(2), pytest.approx(1), None)
    assert found.residual < 1e-9
    # By hand: 2, 2 and 4 ms at 1, 2 and 3 rows are on no line.
    bent = fit({1: np.full(8, 0.002), 2: np.full(8, 0.002), 3: np.full(8, 0.004)}, prompt_tokens=4)
    assert bent is not None
    assert bent.residual > 0.1
    assert fit({1: np.full(8, 0.003)}, prompt_tokens=4) is None


def test_the_command_prints_a_table_or_json(tmp_path):
    folder = str(tiny.make_folder(tmp_path / "model"))
    given = ["bench", "--model", folder, "--rows", "2,1", "--tokens", "8", "--repeats", "1"]
    shown = CliRunner().invoke(cli, [*given, "--profile"])
    assert shown.exit_code == 0, shown.output
    assert [line.split()[0] for line in shown.output.splitlines()[1:3]] == ["1", "2"]
    assert "decode: sampling" in shown.output
    told = json.loads(CliRunner().invoke(cli, [*given, "--json"]).output)
    assert [rate["rows"] for rate in told["decode"]] == [1, 2]
    assert all(rate["tokens_per_s"] > 0 and rate["peak_bytes"] > 0 for rate in told["decode"])
    assert told["update"]["trained_tokens"] == 2 * 8
    one, two = (rate["step_ms"] for rate in told["decode"])
    # Two times, two numbers, unless a factor would be below 0: less for more rows, or nothing
    # for the call itself.
    assert told["fit"]["residual"] < 1e-9 or not one <= two <= 2 * one
    assert all(rate["floor_ms"] > 0 for rate in told["decode"]) or told["rates"] is None
    assert told["left_out"] == []
    assert told["versions"]["mlx"]
    assert "profile" not in told


@pytest.mark.parametrize("rows", ["1,x", ""])
def test_rows_that_are_no_numbers_are_refused(rows):
    told = CliRunner().invoke(cli, ["bench", "--rows", rows])
    assert told.exit_code == 2
    assert "1,2,4,8" in told.output


def test_too_little_to_measure_is_refused(tmp_path):
    folder = str(tiny.make_folder(tmp_path / "model"))
    with pytest.raises(ConfigError, match="at least 1"):
        open_bench(folder, 0, BenchRequest((0,), 8, 8, 1))
    with pytest.raises(ConfigError, match="4 tokens"):
        open_bench(folder, 0, BenchRequest((1,), 8, 3, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_published_shape_is_measured_whole(tmp_path, shape):
    """With a tiny model in place of the real one: the same rows and lengths."""
    folder, sizes = str(tiny.make_folder(tmp_path / "model")), SHAPES[shape]
    given = ["bench", "--shape", shape, "--model", folder, "--repeats", "1"]
    told = json.loads(CliRunner().invoke(cli, [*given, "--json"]).output)
    step = told["step"]
    sampled = sizes.completions * sizes.tokens
    whole = step["update_s"] + sampled / step["rollout_tokens_per_s"]
    assert step["steps_per_s"] == pytest.approx(1 / whole)
    assert step["peak_bytes"] > 0
    assert told["model"]["path"] == folder
    assert told["published"]["model"] == sizes.model
    shown = CliRunner().invoke(cli, given).output
    assert f"{sizes.completions} completions of {sizes.tokens} tokens" in shown
    assert "mlx-tune" in shown
    assert f"The published figures are of {sizes.model}, yours of {folder}." in shown


def test_published_rates_agree_with_each_other():
    """Sampling and update make up a step, as far as their digits go."""
    sizes = SHAPES["qwen3-0.6b"]
    for figure in sizes.figures:
        rate = figure.rate
        sampling_s = sizes.completions * sizes.tokens / rate.rollout_tokens_per_s
        assert 1 / rate.steps_per_s == pytest.approx(sampling_s + rate.update_s, rel=0.01)


def test_a_shape_says_how_to_get_its_model_and_what_it_sets():
    told = CliRunner().invoke(cli, ["bench", "--shape", "qwen3.5-0.8b"])
    assert told.exit_code != 0
    assert "localrl pull mlx-community/Qwen3.5-0.8B-4bit" in told.output
    told = CliRunner().invoke(cli, ["bench", "--shape", "qwen3-0.6b", "--rows", "8"])
    assert "--shape sets its own sizes. Remove --rows." in told.output
    (shape,) = (p for p in cli.commands["bench"].params if p.name == "shape")
    assert list(shape.type.choices) == list(SHAPES)


def test_a_shape_that_memory_does_not_allow_is_no_shape(tmp_path, monkeypatch):
    from localrl.diagnostics import bench
    from localrl.diagnostics.bench_shapes import open_shape
    from localrl.errors import MemoryBudgetError

    allowed = bench._allowed
    monkeypatch.setattr(
        bench, "_allowed", lambda wish, plan: (allowed(wish, plan)[0], ("tokens 256 -> 100",))
    )
    folder = str(tiny.make_folder(tmp_path / "model"))
    with pytest.raises(MemoryBudgetError, match=r"tokens 256 -> 100"):
        open_shape(SHAPES["qwen3-0.6b"], folder, 1, "auto")
