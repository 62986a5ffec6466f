"""The embedded model is what its card says: small, readable by mlx-lm, wrong in the useful way."""

import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from localrl import embedded
from localrl.backend import mx
from localrl.embedded import embedded_model_path
from localrl.errors import ConfigError
from localrl.tasks.builtin import load_task

sys.path.append(str(Path(__file__).parents[1] / "models"))

import fast_cpu
from check_steps import Sample, accuracy, first_share, load_float, sample


@cache
def samples(n: int, banned: str = "") -> list[Sample]:
    """One completion each of the first `n` held-out prompts at temperature 1."""
    examples = load_task("steps", train_prompts=0).evaluation(n)
    return sample(*load_float(embedded_model_path()), examples, seed=11, banned=banned)


def test_folder_is_at_most_one_megabyte():
    files = [f for f in embedded_model_path().iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 1_000_000


def test_mlx_lm_reads_it_in_four_bits_and_float32():
    from mlx_lm import load

    model, tokenizer, config = load(str(embedded_model_path()), return_config=True)
    assert config["quantization"]["bits"] == 4
    assert model.layers[0].self_attn.q_proj.bits == 4
    logits = model(mx.array([tokenizer.encode("sum 47 85")]))
    assert logits.dtype == mx.float32


def test_chat_template_and_characters_round_trip():
    tokenizer = load_float(embedded_model_path())[1]
    turns = [
        {"role": "user", "content": "sum 47 85 36 12"},
        {"role": "assistant", "content": "740;#180"},
        {"role": "user", "content": "sort kgbpa"},
    ]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|user|>sum 47 85 36 12<|assistant|>740;#180<|end|><|user|>sort kgbpa<|assistant|>"
    )
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert tokenizer.decode(ids) == text
    assert len(ids) == 1 + 15 + 1 + 8 + 1 + 1 + 10 + 1
    assert tokenizer.eos_token == "<|end|>"


def test_base_is_right_on_a_third_of_held_out_prompts():
    assert 0.20 < accuracy(samples(256)) < 0.50
    for family in ("sums", "sorting"):
        part = [s for s in samples(256) if s.example.columns["family"] == family]
        assert 0.20 < accuracy(part) < 0.50


def test_less_than_half_of_the_entropy_is_in_the_first_four_tokens():
    assert first_share(samples(256)[:64]) < 0.5


def test_it_can_nearly_always_work_every_step():
    assert accuracy(samples(256, banned="?")) > 0.95


def test_model_is_looked_for_in_the_package_then_beside_it(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "localrl" / "embedded.py"))
    homes = {"steps-0.8m": "embedded_model", "turns-0.1m": "embedded_turns"}
    assert tuple(homes) == embedded.EMBEDDED_MODELS
    for name, home in homes.items():
        with pytest.raises(ConfigError, match=f"{name} is in neither.*make_{name[:5]}"):
            embedded_model_path(name)
        beside, inside = tmp_path / "models" / name, tmp_path / "localrl" / home
        for folder in (beside, inside):
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            assert embedded_model_path(name) == folder
    assert embedded_model_path() == tmp_path / "localrl" / "embedded_model"
    with pytest.raises(ConfigError, match=r"'tuns'. Choose steps-0.8m or turns-0.1m"):
        embedded_model_path("tuns")


def test_a_wheel_carries_every_embedded_model():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    packing = project["tool"]["setuptools"]
    for name in embedded.EMBEDDED_MODELS:
        package = f"localrl.{embedded._HOMES[name][0]}"
        assert package in packing["packages"]
        assert packing["package-dir"][package] == f"models/{name}"
        assert packing["package-data"][package] == ["*"]


def test_fast_training_formulas_and_gradients_are_those_of_mlx():
    from mlx_lm.models.base import scaled_dot_product_attention

    def slow(q: mx.array, k: mx.array, gate: mx.array) -> mx.array:
        out = scaled_dot_product_attention(q, k, k, cache=None, scale=0.3, mask="causal")
        return (out**2).sum() + ((gate * mx.sigmoid(gate) * gate) ** 2).sum()

    def fast(q: mx.array, k: mx.array, gate: mx.array) -> mx.array:
        out = fast_cpu.causal_attention(q, k, k, scale=0.3)
        return (out**2).sum() + (fast_cpu.swiglu(gate, gate) ** 2).sum()

    keys = mx.random.split(mx.random.key(0), 3)
    shapes = ((2, 4, 7, 8), (2, 2, 7, 8), (5, 6))
    inputs = [mx.random.normal(s, key=k) for s, k in zip(shapes, keys, strict=True)]
    for ours, theirs in zip(
        mx.grad(fast, argnums=(0, 1, 2))(*inputs),
        mx.grad(slow, argnums=(0, 1, 2))(*inputs),
        strict=True,
    ):
        assert mx.abs(ours - theirs).max().item() < 1e-4
