"""Each family at tiny size: what it is tried for, and families that are refused.

Forking in the middle of a completion is in tests/rollouts/test_forking.py, for the same families.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from forests import forest, scored

from localrl.backend import mx, nn, tree_flatten
from localrl.engines import choose
from localrl.engines.choose import choose_engine
from localrl.engines.mlx.engine import MLXEngine
from localrl.engines.mlx.logprobs import gather_logprobs, head_logprobs
from localrl.engines.open import make_policy
from localrl.errors import ConfigError
from localrl.learning.credit import assign_credit
from localrl.learning.objectives import make_objective
from localrl.learning.selection import select
from localrl.learning.update import Updater, global_norm
from localrl.policy.model import load_model
from localrl.policy.scoring import forest_agrees
from localrl.records import MemoryPlan
from localrl.settings import LearningConfig

LEARNING = LearningConfig(clip_low=1.0, clip_high=100.0)
GEMMA3 = {"model_type": "gemma3", "text_config": {**tiny.CONFIG, **tiny.FAMILIES["gemma3_text"]}}
FAMILIES = {**tiny.FAMILIES, **tiny.UNPLANNED, "gemma3": GEMMA3}
"""`gemma3` is the text part of a model that sees images."""
WRONG = {
    "llama4": {
        "model_type": "llama4",
        "num_hidden_layers": 4,
        "text_config": {
            **tiny.CONFIG,
            "model_type": "llama4_text",
            "num_hidden_layers": 4,
            "attention_chunk_size": 8,
            "attention_bias": False,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 128,
            "num_experts_per_tok": 1,
            "num_local_experts": 2,
            "rope_scaling": None,
            "use_qk_norm": True,
        },
    },
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def policy(request, tmp_path_factory):
    """4-bit weights as they are stored, and adapters that do something."""
    folder = tmp_path_factory.mktemp("models") / request.param
    loaded = load_model(tiny.make_folder(folder, **FAMILIES[request.param]))
    made = make_policy(loaded, rank=4, scale=2.0, seed=0, for_cpu=True, dense=False)
    tiny.stir(made.model, 0)
    return made


def family(policy) -> str:
    return type(policy.model).__module__.rpartition(".")[2]


def batch():
    group = scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2), [0, 1, 0])
    credit = assign_credit(group)
    return select([group], [credit], 40.0, make_objective(LEARNING)).batch


def test_padded_prompts_and_forked_rows_are_those_of_single_ones(policy):
    choose_engine(policy)


def test_the_chunked_head_gives_the_logprobs_of_whole_logits(policy):
    network = policy.engine.network
    assert network.hidden is not None
    assert network.head is not None
    tokens = mx.array([[1, 7, 30, 4, 4, 12, 9, 2, 60, 11]])
    whole = gather_logprobs(policy.model(tokens)[0, :-1], tokens[0, 1:], 0.7)
    states = network.hidden(tokens)[0, :-1]
    parts = head_logprobs(network.head, states, tokens[0, 1:], 0.7, 4)
    np.testing.assert_allclose(np.array(parts), np.array(whole), atol=1e-4)


def test_shared_prefixes_score_as_rows(policy):
    assert forest_agrees(policy, batch(), temperature=0.8, head_chunk=16)


def test_every_adapter_learns_through_quantised_weights(policy):
    quantised = [m for m in policy.model.modules() if isinstance(m, nn.QuantizedLinear)]
    assert quantised
    updater = Updater(policy, LEARNING, 0.8, lambda line: None)
    plan = MemoryPlan(8, 8, 8, 4, 16, 64, 40, False, True, None, None, None, "")
    gradient, _ = updater.gradient(batch(), plan)
    assert np.isfinite(global_norm(gradient))
    still = [name for name, array in tree_flatten(gradient) if not mx.any(array != 0).item()]
    assert not still


@pytest.mark.parametrize("name", list(WRONG))
def test_a_family_that_batches_wrongly_is_refused(tmp_path, name):
    policy = tiny.make_tiny_policy(tmp_path / name, **WRONG[name])
    with pytest.raises(ConfigError, match=rf"family {name}.*Use another model"):
        choose_engine(policy)


def test_a_cache_that_forgets_its_padding_is_found(policy, monkeypatch):
    prefill = MLXEngine.prefill

    def careless(self, tokens, lengths):
        return prefill(self, tokens, [tokens.shape[1]] * len(lengths))

    monkeypatch.setattr(MLXEngine, "prefill", careless)
    with pytest.raises(ConfigError, match="padded prompts"):
        choose_engine(policy)


def test_a_fork_of_the_wrong_row_is_found(policy, monkeypatch):
    expected = choose._plain(policy.model, choose._Texts.of(policy.tokenizer.plain_tokens()))
    monkeypatch.setattr(choose, "_plain", lambda model, texts: expected)
    monkeypatch.setattr(choose, "FORK", (0, 1, 0))
    with pytest.raises(ConfigError, match="forked rows"):
        choose_engine(policy)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    policy = tiny.make_tiny_policy(tmp_path / "model")
    norm = policy.model.model.layers[0].input_layernorm
    norm.weight = norm.weight.at[3].multiply(value)
    with pytest.raises(ConfigError, match=r"not finite: model.layers.0.input_layernorm.weight has"):
        choose_engine(policy)


def test_logits_that_are_no_numbers_are_found(policy, monkeypatch):
    nothing = np.full((2, 64), np.nan), np.full((3, 64), np.nan)
    monkeypatch.setattr(choose, "_batched", lambda engine, texts, prompts: nothing)
    with pytest.raises(ConfigError, match="padded_prompts found nan"):
        choose_engine(policy)
