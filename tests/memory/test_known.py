"""The shipped table of well-known models, against what is published of them."""

from __future__ import annotations

import pytest

from localrl.memory.known_models import find_known, known_names
from localrl.memory.sizes import FULL, kv_bytes, parameters, read_sizes, weight_bytes

PUBLISHED = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-270m-it": 268_098_176,
    "google/gemma-3-1b-it": 999_885_952,
    # Without the tower that sees images, and its projector.
    "google/gemma-3-4b-it": 4_300_079_472 - 416_866_032 - 2_950_272,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "LiquidAI/LFM2-350M": 354_483_968,
    "LiquidAI/LFM2-700M": 742_489_344,
    "LiquidAI/LFM2-1.2B": 1_170_340_608,
    "LiquidAI/LFM2.5-1.2B-Instruct": 1_170_340_608,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    # The language models alone, without what sees images and what predicts several tokens.
    "Qwen/Qwen3.5-0.8B": 752_393_024,
    "Qwen/Qwen3.5-2B": 1_881_825_088,
    "Qwen/Qwen3.5-4B": 4_205_751_296,
    "Qwen/Qwen3.5-9B": 8_953_803_264,
    # As in their GGUF files, less rotary frequencies (256) and the keys and values of layers that
    # use others', which mlx-lm does not load: 16 and 15 with a window, 4 and 3 without one.
    "google/gemma-4-E2B-it": 4_647_450_147 - 256 - (2 * 1536 + 1) * (16 * 256 + 4 * 512),
    "google/gemma-4-E4B-it": 7_518_069_290 - 256 - (4 * 2560 + 1) * (15 * 256 + 3 * 512),
    "ibm-granite/granite-4.0-micro": 3_402_836_480,
    "ibm-granite/granite-4.0-h-micro": 3_191_396_096,
    "ibm-granite/granite-4.0-h-tiny": 6_939_037_248,
}


def sizes(name):
    shape = find_known(name)
    assert shape is not None
    return read_sizes(shape)


def test_all_known_models_are_here():
    assert known_names() == list(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_weights_as_published(name):
    found = sizes(name)
    assert found.known
    assert parameters(found).total == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "kibibytes"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 12),
        ("meta-llama/Llama-3.2-1B-Instruct", 32),
        ("Qwen/Qwen3-0.6B", 112),
        ("Qwen/Qwen3-1.7B", 112),
        ("Qwen/Qwen3-8B", 144),
        # 6 of 16 blocks with 8 heads of 64, and states that do not grow.
        ("LiquidAI/LFM2-350M", 12),
        # 6 of 24 blocks with 2 heads of 256.
        ("Qwen/Qwen3.5-0.8B", 12),
        # 12 layers with a window of 512 tokens, and 3 without one, whose heads are wider.
        ("google/gemma-4-E2B-it", 18),
        ("ibm-granite/granite-4.0-h-tiny", 8),
    ],
)
def test_bytes_that_a_token_adds_to_the_cache(name, kibibytes):
    found = sizes(name)
    grown = [kv_bytes(found, tokens, bytes_per_number=2) for tokens in (64, 128)]
    assert grown[1] - grown[0] == 64 * kibibytes * 1024


def test_states_of_hybrids():
    """In float32, 18 layers of 16 heads have a state of 128 x 128 each, and Granite 36 of 48."""
    assert sizes("Qwen/Qwen3.5-0.8B").state_numbers == 18 * 16 * 128 * 128
    assert sizes("ibm-granite/granite-4.0-h-tiny").state_numbers == 36 * 48 * 64 * 128


def test_windows_of_gemma():
    assert sizes("google/gemma-3-270m-it").windows == ((512,) * 5 + (FULL,)) * 3
    assert sizes("google/gemma-3-1b-it").windows.count(FULL) == 4
    text = sizes("google/gemma-3-4b-it")
    assert (text.heads, text.kv_heads, text.head_dim, text.vocabulary) == (8, 4, 256, 262208)
    assert text.windows[:6] == (1024,) * 5 + (FULL,)
    assert text.layers == 34


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mlx-community/Qwen3-0.6B-4bit", 4),
        ("mlx-community/Qwen3-0.6B-8bit", 8),
        ("mlx-community/Qwen3-0.6B-bf16", 0),
        ("Qwen3-0.6B-4bit", 4),
        ("qwen3-0.6b", 0),
        ("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit", 4),
    ],
)
def test_conversions(name, bits):
    found = sizes(name)
    assert found.bits == bits
    if bits:
        total = parameters(found).total
        of_weight = bits / 8 + 2 * 2 / 64
        # Norms are not quantised: of 0.6B and more weights they are below a thousandth.
        taken = weight_bytes(found, float32=False, dense=False)
        assert of_weight * total < taken < 1.001 * of_weight * total


def test_a_model_that_a_package_ships_is_known_as_its_file_is_quantised():
    found = sizes("smollm2-135m")
    assert parameters(found).total == PUBLISHED["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert found.bits == 4
    embedding = 49_152 * 576
    linear = parameters(found).linear
    norms = (2 * 30 + 1) * 576
    # Groups of 32 have a scale and a bias of 16 bits: a bit of each weight more.
    expected = embedding * 9 // 8 + linear * 5 // 8 + norms * 2
    assert weight_bytes(found, float32=False, dense=False) == expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        "SmolLM2-135M",
        "Qwen/Qwen3-0.6B-4bit",
        "someone/Qwen3-0.6B",
        "mlx-community/Qwen3-0.6B-4bit-DWQ",
        "mlx-community/Qwen3-0.6B-1bit",
        "Qwen3-0.6B-Base",
        "4bit",
    ],
)
def test_other_names_are_not_known(name):
    assert find_known(name) is None
