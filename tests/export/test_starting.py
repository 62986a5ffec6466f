"""A run that starts from an adapter."""

from __future__ import annotations

import tomllib

import numpy as np
import pytest
import tiny

from localrl.backend import mx
from localrl.config import RunConfig
from localrl.engines.open import make_policy
from localrl.errors import CheckpointError, ConfigError
from localrl.export.adapters import adapter_of, read_adapter, write_adapter
from localrl.export.starting import starting_adapter
from localrl.policy.model import load_model
from localrl.train import train

SMALL = {
    "rollout.prompts_per_step": 2,
    "rollout.group_size": 2,
    "rollout.max_completion_tokens": 6,
    "task.name": "sums",
    "task.eval_prompts": 0,
    "run.steps": 1,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_folder):
    """An adapter of rank 4 on the last block's attention, and the logits it gives."""
    policy = make_policy(
        load_model(tiny_folder),
        rank=4,
        scale=3.0,
        seed=0,
        for_cpu=True,
        dense=True,
        layers=1,
        keys=("self_attn.q_proj", "self_attn.v_proj"),
    )
    tiny.stir(policy.model, seed=1)
    folder = tmp_path_factory.mktemp("start") / "adapter"
    write_adapter(adapter_of(policy.model), folder)
    return folder, logits(policy.model)


def logits(model):
    return np.array(model(mx.array([[1, 5, 9, 2, 7]])))


def config(tiny_folder, tmp_path, **settings):
    settings = {name.replace("__", "."): value for name, value in settings.items()}
    out = {"model.path": str(tiny_folder), "run.out": str(tmp_path / "run")}
    return RunConfig.create({**SMALL, **out, **settings})


def test_it_goes_on_exactly_where_the_adapter_stands(tiny_folder, tmp_path, start):
    folder, before = start
    settings = config(tiny_folder, tmp_path, lora__adapter=str(folder), run__steps=0)
    resolved, adapter = starting_adapter(settings, blocks=2)
    assert adapter is not None
    lora = resolved.lora
    assert (lora.rank, lora.scale, lora.layers) == (4, 3.0, 1)
    policy = make_policy(
        load_model(tiny_folder),
        rank=lora.rank,
        scale=lora.scale,
        seed=5,
        for_cpu=True,
        dense=True,
        layers=lora.layers,
        keys=lora.keys,
        weights=adapter.weights,
    )
    assert np.abs(logits(policy.model) - before).max() == 0
    after = read_adapter(train(settings).folder / "adapter")  # of a run without a step
    assert all((after.weights[n] == w).all() for n, w in adapter.weights.items())


def test_the_run_leaves_an_adapter_of_the_same_shape(tiny_folder, tmp_path, start):
    folder, _ = start
    rate = {"learning__lr": 1e-2, "learning__warmup_steps": 0, "task__name": "steps"}
    result = train(config(tiny_folder, tmp_path, lora__adapter=str(folder), **rate))
    after, before = read_adapter(result.folder / "adapter"), read_adapter(folder)
    assert (after.rank, after.scale, after.layers) == (4, 3.0, 1)
    assert after.weights.keys() == before.weights.keys()
    written = tomllib.loads((result.folder / "config.toml").read_text())
    assert (written["lora"]["rank"], written["lora"]["layers"]) == (4, 1)
    again = RunConfig.create(file=result.folder / "config.toml")
    assert starting_adapter(again, blocks=2)[0] == again


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lora__rank": 8}, "lora.rank is 8, but the adapter in .* has 4. Remove lora.rank"),
        ({"lora__scale": 1.0}, "lora.scale is 1.0, but the adapter in .* has 3.0"),
        ({"lora__layers": 2}, "lora.layers is 2, but the adapter in .* has 1"),
        ({"lora__keys": ["mlp.up_proj"]}, r"lora.keys is \['mlp.up_proj'\], but the adapter in"),
    ],
)
def test_a_setting_that_contradicts_it_is_refused(tiny_folder, tmp_path, start, setting, message):
    settings = config(tiny_folder, tmp_path, lora__adapter=str(start[0]), **setting)
    with pytest.raises(ConfigError, match=message):
        train(settings)
    assert not (tmp_path / "run").exists()


def test_a_setting_that_agrees_is_no_contradiction(tiny_folder, tmp_path, start):
    keys = ["self_attn.v_proj", "self_attn.q_proj"]
    settings = config(tiny_folder, tmp_path, lora__adapter=str(start[0]), lora__keys=keys)
    assert starting_adapter(settings, blocks=2)[0].lora.rank == 4


def test_no_adapter_there(tiny_folder, tmp_path):
    settings = config(tiny_folder, tmp_path, lora__adapter=str(tmp_path))
    with pytest.raises(ConfigError, match="no adapter in"):
        starting_adapter(settings, blocks=2)


def test_a_damaged_one_is_refused_before_the_run(tiny_folder, tmp_path, start):
    copy = tmp_path / "copy"
    write_adapter(read_adapter(start[0]), copy)
    with (copy / "adapters.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    settings = config(tiny_folder, tmp_path, lora__adapter=str(copy))
    with pytest.raises(CheckpointError, match="checksum"):
        train(settings)
    assert not (tmp_path / "run").exists()


def test_one_of_another_model_is_refused(tmp_path, start):
    other = tiny.make_folder(tmp_path / "other", hidden_size=32)
    settings = config(other, tmp_path, lora__adapter=str(start[0]))
    with pytest.raises(ConfigError, match="does not fit this model"):
        train(settings)


def test_a_wrong_base_id_is_found_before_the_run(tiny_folder, tmp_path):
    settings = config(tiny_folder, tmp_path, model__base_id="/some/where")
    with pytest.raises(ConfigError, match="must be a Hub id"):
        train(settings)
