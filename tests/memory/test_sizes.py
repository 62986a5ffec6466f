"""Sizes read from a config.json, against what mlx-lm builds from it."""

from __future__ import annotations

import copy

import pytest
import tiny

from localrl.backend import mx, nn, tree_flatten
from localrl.errors import ConfigError
from localrl.memory.sizes import (
    FULL,
    NONE,
    lora_parameters,
    parameters,
    quantised,
    read_sizes,
    weight_bytes,
)
from localrl.policy.lora import attach
from localrl.policy.precision import dequantise, quantise, to_float32

GEMMA3_TEXT = {**tiny.CONFIG, **tiny.FAMILIES["gemma3_text"]}
GEMMA4_TEXT = {**tiny.CONFIG, **tiny.FAMILIES["gemma4_text"]}
MORE = {
    "gemma3": {"model_type": "gemma3", "text_config": GEMMA3_TEXT},
    "gemma2": {"model_type": "gemma2"},
    "mistral": {"model_type": "mistral", "sliding_window": 32},
    "llama with windows": {
        "model_type": "llama",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "phi3": {"model_type": "phi3"},
    "granite": {
        "model_type": "granite",
        "logits_scaling": 1.0,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_bias": True,
        "mlp_bias": False,
    },
    "olmo2": {"model_type": "olmo2", "head_dim": None},
    "olmo3": {"model_type": "olmo3", "sliding_window": 16, "num_hidden_layers": 5},
    "glm4": {"model_type": "glm4", "attention_bias": True, "partial_rotary_factor": 0.5},
    "lfm2 that adjusts": {
        **tiny.FAMILIES["lfm2"],
        "block_auto_adjust_ff_dim": True,
        "conv_bias": True,
        "full_attn_idxs": [1],
    },
    "qwen3_moe, half dense": {
        **tiny.FAMILIES["qwen3_moe"],
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "qwen3_5, of one dictionary": {
        **tiny.FAMILIES["qwen3_5"]["text_config"],
        "model_type": "qwen3_5",
        "attention_bias": True,
        "full_attention_interval": 3,
    },
    "gemma4": {"model_type": "gemma4", "vocab_size": 64, "text_config": GEMMA4_TEXT},
    # As in the largest ones: no embeddings per layer, values that are keys, and experts.
    "gemma4_text, experts": {
        **tiny.FAMILIES["gemma4_text"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "gemma4_text, narrow": {**tiny.FAMILIES["gemma4_text"], "use_double_wide_mlp": False},
    "granitemoehybrid, experts": {
        **tiny.FAMILIES["granitemoehybrid"],
        "mamba_proj_bias": True,
        "mamba_conv_bias": False,
        "mamba_n_groups": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 96,
    },
}
FAMILIES = {**tiny.FAMILIES, **MORE}


def config_of(name, **changes):
    config = {**tiny.CONFIG, **FAMILIES[name], **changes}
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], **changes}
    return config


def build(config, bits=0, group_size=32):
    """The model that mlx-lm makes of the configuration."""
    from mlx_lm.utils import _get_classes

    config = copy.deepcopy(config)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    if config["tie_word_embeddings"] and "gemma3" in config["model_type"]:
        getattr(model, "language_model", model).sanitize({})
    if bits:
        nn.quantize(model, group_size=group_size, bits=bits)
    return model


def stored(config, bits=4, group_size=32):
    return {**config, "quantization": {"bits": bits, "group_size": group_size}}


def beside_modules(model):
    """Number of weights that mlx-lm's count omits: of modules that hold modules as well."""
    return sum(
        array.size
        for module in model.modules()
        if tree_flatten(module.children(), is_leaf=lambda value: isinstance(value, nn.Module))
        for array in module.values()
        if isinstance(array, mx.array)
    )


def held(model):
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_as_many_weights_as_mlx_lm_makes(name, tied):
    from mlx_lm.utils import get_total_parameters

    config = config_of(name, tie_word_embeddings=tied)
    found = read_sizes(config)
    total = sum(array.size for _, array in tree_flatten(build(config).parameters()))
    assert found.known
    assert parameters(found).total == total
    packed = parameters(read_sizes(stored(config))).total
    model = build(config, 4)
    assert packed == total == get_total_parameters(model) + beside_modules(model)


def test_weights_by_kind_are_those_worked_out_by_hand():
    found = parameters(read_sizes(config_of("qwen3_moe", tie_word_embeddings=False)))
    assert found.embedding == found.head == 64 * 64
    attention = 2 * 64 * 64 + 2 * 64 * 32
    assert found.linear == 2 * (attention + 64 * 4)
    assert found.experts == 2 * 4 * 3 * 64 * 32
    assert found.others == 2 * (2 * 64 + 2 * 16) + 64


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_bytes_of_the_weights_in_every_form(name, bits):
    config = config_of(name, tie_word_embeddings=False)
    found = read_sizes(stored(config, bits))
    model = build(config, bits)
    model.set_dtype(mx.bfloat16)
    assert held(model) == weight_bytes(found, float32=False, dense=False)
    to_float32(model)
    assert held(model) == weight_bytes(found, float32=True, dense=False)
    dequantise(model, as_float32=True)
    assert held(model) == weight_bytes(found, float32=True, dense=True)


def test_bytes_of_floats_as_they_are_stored():
    config = config_of("qwen2")
    model = build(config)
    wide, narrow = read_sizes({**config, "dtype": "float32"}), read_sizes(config)
    assert weight_bytes(wide, float32=False, dense=False) == held(model)
    model.set_dtype(mx.float16)
    assert weight_bytes(narrow, float32=False, dense=False) == held(model)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_bytes_of_other_packings(mode):
    bits, group_size = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}[mode]
    config = config_of("qwen3")
    model = build(config)
    nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
    model.set_dtype(mx.bfloat16)
    settings = {"bits": bits, "group_size": group_size, "mode": mode}
    found = read_sizes({**config, "quantization": settings})
    assert weight_bytes(found, float32=False, dense=False) == held(model)


def test_single_matrices_may_be_packed_otherwise():
    config = config_of("gemma3")
    within = "language_model.model"
    special = {
        f"{within}.layers.1.mlp.down_proj": {"bits": 8, "group_size": 64},
        f"{within}.layers.0.self_attn.q_proj": False,
        f"{within}.embed_tokens": {"bits": 6, "group_size": 32},
        f"{within}.layers.2.mlp.up_proj": True,
    }
    model = build(config)
    nn.quantize(
        model,
        group_size=32,
        bits=4,
        class_predicate=lambda path, module: special.get(path, hasattr(module, "to_quantized")),
    )
    model.set_dtype(mx.bfloat16)
    found = read_sizes({**config, "quantization": {"bits": 4, "group_size": 32, **special}})
    assert weight_bytes(found, float32=False, dense=False) == held(model)
    assert found.bits == 4


@pytest.mark.parametrize(
    "name",
    [
        *("qwen3", "qwen3_moe", "lfm2", "olmo2", "qwen3_5", "qwen3_5_moe", "gemma4"),
        *("gemma4_text, experts", "granitemoehybrid, experts"),
    ],
)
@pytest.mark.parametrize("width", [64, 96])
def test_sizes_after_quantising(name, width):
    # Of 96 columns 64 are no divisor: they take groups of 32.
    config = config_of(name, hidden_size=width, block_dim=width)
    model = build(config)
    quantise(model, 4)
    model.set_dtype(mx.bfloat16)
    found = quantised(read_sizes(config, weight_bytes=1), 4)
    assert weight_bytes(found, float32=False, dense=False) == held(model)
    assert (found.bits, found.stored_bytes) == (4, None)
    assert quantised(found, 4) is quantised(found, 0) is found


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_as_many_adapter_weights_as_are_attached(name, bits):
    config = config_of(name)
    found = read_sizes(config)
    for layers in (0, 1):
        model = build(config, bits)
        keys = attach(model, rank=4, scale=1.0, seed=0, layers=layers)
        count = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
        assert lora_parameters(found, 4, layers) == count
        assert lora_parameters(found, 4, layers, keys) == count
        model = build(config, bits)
        attach(model, rank=3, scale=1.0, seed=0, layers=layers, keys=keys[:1])
        count = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
        assert lora_parameters(found, 3, layers, keys[:1]) == count


def test_a_router_may_be_named():
    # Hand-worked: 2 blocks, rank 4, from a width of 64 to 4 experts.
    assert lora_parameters(read_sizes(config_of("qwen3_moe")), 4, 0, ["mlp.gate"]) == 2 * 4 * 68


def test_adapters_that_cannot_be():
    found = read_sizes(config_of("qwen3"))
    with pytest.raises(ConfigError, match=r"lora\.layers is 3; the model has 2"):
        lora_parameters(found, 4, 3)
    with pytest.raises(ConfigError, match=r"Did you mean 'self_attn\.q_proj'"):
        lora_parameters(found, 4, 0, ["self_attn.q_pro"])


def test_kinds_of_caches():
    assert read_sizes(config_of("gemma3")).windows == (8, 8, FULL)
    assert read_sizes(config_of("olmo3")).windows == (16, 16, 16, FULL, 16)
    assert read_sizes(config_of("lfm2")).windows == (NONE, FULL, NONE)
    assert read_sizes(config_of("lfm2")).tail_numbers == 2 * 2 * 64
    assert read_sizes(config_of("qwen3_5")).windows == (NONE, NONE, NONE, FULL)
    assert read_sizes(config_of("granitemoehybrid")).windows == (NONE, FULL, NONE)
    gemma4 = read_sizes(config_of("gemma4"))
    assert gemma4.windows == (8, FULL) * 2
    # The last two have no keys and values of their own; those without a window have wider heads.
    assert gemma4.cached == (2 * 2 * 16, 2 * 2 * 32, 0, 0)
    # mlx-lm lets these keep everything, whatever their configurations say of windows.
    assert read_sizes(config_of("mistral")).windows == (FULL, FULL)
    assert read_sizes(config_of("qwen2", sliding_window=4)).windows == (FULL, FULL)


def test_a_family_that_is_not_known():
    config = {
        "model_type": "new",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "layer_types": ["linear_attention", "sliding_attention"],
        "sliding_window": 16,
    }
    found = read_sizes(config)
    assert (found.known, found.tied) == (False, False)
    assert (found.heads, found.kv_heads, found.head_dim, found.ffn) == (4, 4, 64, 1024)
    assert found.windows == (NONE, 16)
    total = 2 * (4 * 256**2 + 3 * 256 * 1024 + 2 * 256) + 256 + 2 * 100 * 256
    assert parameters(found).total == total
    # The files say what it takes, where they are there.
    assert weight_bytes(found, float32=True, dense=False) == 4 * total
    measured = read_sizes(config, weight_bytes=3 * total)
    assert weight_bytes(measured, float32=False, dense=False) == 3 * total
    assert weight_bytes(measured, float32=True, dense=False) == 6 * total


def test_experts_of_a_family_that_is_not_known():
    config = config_of("qwen3_moe", model_type="new", n_shared_experts=1, first_k_dense_replace=1)
    found = read_sizes(config)
    assert found.ffn == 3 * 32
    assert parameters(found).experts == 4 * 3 * 64 * 32
    assert read_sizes(config_of("qwen3_moe")).ffn == 2 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "has no vocab_size"),
        ({"hidden_size": 0}, "impossible hidden_size: 0"),
        ({"hidden_size": "64"}, "impossible hidden_size: '64'"),
        ({"num_hidden_layers": True}, "impossible num_hidden_layers"),
        ({"num_hidden_layers": 10**8}, "100000000 layers"),
        ({"num_key_value_heads": -1}, "impossible num_key_value_heads"),
        ({"num_attention_heads": 0}, "impossible num_attention_heads"),
        ({"model_type": "olmo3", "layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ({"model_type": "olmo3", "layer_types": 3}, "layer_types that is not a plain list"),
        ({"model_type": "qwen3_5", "full_attention_interval": 0}, "full_attention_interval: 0"),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]},
            "no mamba_n_heads, which its Mamba layers need",
        ),
        ({"model_type": "lfm2", "full_attn_idxs": [[0]]}, "full_attn_idxs that is not a plain"),
        ({"model_type": "lfm2", "block_ffn_dim_multiplier": "1"}, "block_ffn_dim_multiplier: '1'"),
        ({"quantization": {"bits": 0, "group_size": 64}}, "impossible quantization.bits"),
        ({"quantization": {"bits": 4, "group_size": 0}}, "impossible quantization.group_size"),
    ],
)
def test_sizes_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        read_sizes({**tiny.CONFIG, **changes})
