from __future__ import annotations

import json

import numpy as np
import pytest
import tiny

from localrl.backend import mx, nn
from localrl.engines.open import make_policy
from localrl.errors import ConfigError
from localrl.policy.model import load_model, read_shape


def test_dequantised_weights_compute_the_same(tiny_folder):
    tokens = mx.array([[1, 5, 9, 2, 7]])
    packed, dense = (
        make_policy(load_model(tiny_folder), rank=2, scale=1.0, seed=0, for_cpu=True, dense=d)
        for d in (False, True)
    )
    assert isinstance(packed.model.layers[0].mlp.up_proj.linear, nn.QuantizedLinear)
    assert isinstance(dense.model.layers[0].mlp.up_proj.linear, nn.Linear)
    np.testing.assert_allclose(
        np.array(packed.model(tokens)), np.array(dense.model(tokens)), atol=1e-4
    )


def test_prompts_end_where_the_model_writes(policy):
    text = policy.tokenizer.render([{"role": "user", "content": "sum 1 2"}])
    assert text == "<user>sum 1 2<assistant>"
    ids = policy.tokenizer.encode([{"role": "user", "content": "sum 1 2"}])
    assert (ids[0], ids[-1]) == (1, 2)
    assert len(ids) == len("sum 1 2") + 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        ("{", "not valid JSON"),
        (json.dumps(tiny.CONFIG), "Cannot load the model"),
    ],
)
def test_a_folder_that_is_no_model_is_named(tmp_path, content, message):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path)


def test_a_config_without_sizes_is_named(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", bits=None)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ConfigError, match="has no 'num_hidden_layers'"):
        load_model(folder)


def test_an_unknown_family_is_named(tmp_path):
    folder = tiny.make_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    with pytest.raises(ConfigError, match="nonsense"):
        load_model(folder)


def test_a_model_that_needs_its_own_code_is_refused(tmp_path):
    folder = tiny.make_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.raises(ConfigError, match=r"own\.py"):
        load_model(folder)
    assert not (tmp_path / "canary").exists()


def test_shape(tiny_folder):
    shape = read_shape(tiny_folder)
    assert (shape.layers, shape.width, shape.vocabulary) == (2, 64, 64)
