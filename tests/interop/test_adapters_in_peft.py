"""One adapter folder, two programs: mlx-lm, and PEFT on transformers with CPU torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
import pytest
import tiny
import torch
from hub_models import MODELS, make_hub_model, open_hub_model
from mlx_lm.utils import save_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from localrl.backend import mx, nn, tree_unflatten
from localrl.embedded import embedded_model_path
from localrl.engines.open import make_policy
from localrl.export.adapters import adapter_of, read_adapter, write_adapter
from localrl.policy.model import load_model

TOKENS = [[1, 5, 9, 2, 7, 30, 11, 8], [3, 1, 40, 41, 12, 12, 6, 2]]
FAMILIES = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    # Wider than its input, square, and with a head of its own.
    "llama, other sizes": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
    },
}
RESTRICTED = {
    "all layers": {},
    "the last block": {"layers": 1},
    "some layers": {"keys": ("self_attn.q_proj", "mlp.down_proj")},
    "some layers of the last block": {"layers": 1, "keys": ("self_attn.o_proj",)},
}


def mlx_logits(model: Path, adapter: Path | None = None) -> np.ndarray:
    """Of mlx-lm itself, not of localrl's own layers."""
    loaded = mlx_lm.load(str(model), adapter_path=None if adapter is None else str(adapter))[0]
    return np.array(loaded(mx.array(TOKENS)).astype(mx.float32))


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.float().numpy()


def hf_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def stirred_adapter(model: Path, folder: Path, size: float = 0.3, **where: Any) -> Path:
    """A folder written by localrl for adapters that change the model a good deal."""
    policy = make_policy(
        load_model(model), rank=4, scale=2.5, seed=3, for_cpu=True, dense=True, **where
    )
    tiny.stir(policy.model, seed=1, size=size)
    assert write_adapter(adapter_of(policy.model, base_id="acme/tiny"), folder) is None
    expected = np.array(policy.model(mx.array(TOKENS)))
    assert np.abs(mlx_logits(model, folder) - expected).max() < 1e-4
    return folder


@pytest.mark.parametrize("where", RESTRICTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_and_mlx_lm_give_the_same_logits(tmp_path: Path, family: str, where: str) -> None:
    model = tiny.make_folder(tmp_path / "model", bits=None, **FAMILIES[family])
    adapter = stirred_adapter(model, tmp_path / "adapter", **RESTRICTED[where])
    bare, adapted = mlx_logits(model), mlx_logits(model, adapter)
    base = hf_model(model)
    assert np.abs(torch_logits(base) - bare).max() < 1e-4
    theirs = torch_logits(PeftModel.from_pretrained(base, adapter))
    difference, effect = np.abs(theirs - adapted).max(), np.abs(adapted - bare).max()
    print(f"{family}, {where}: difference {difference:.1e}, effect {effect:.2f}")
    assert effect > 0.1
    assert difference < 1e-4


@pytest.mark.parametrize("family", MODELS)
def test_a_model_of_transformers_takes_the_adapter_trained_on_its_folder(
    tmp_path: Path, family: str
) -> None:
    """mlx-lm reads the folder as its `sanitize` does: split, transposed, norms plus one."""
    model = make_hub_model(tmp_path / "model", family)
    adapter = stirred_adapter(model, tmp_path / "adapter", size=0.1)
    bare, adapted = mlx_logits(model), mlx_logits(model, adapter)
    theirs = torch_logits(PeftModel.from_pretrained(open_hub_model(model), adapter))
    difference, effect = np.abs(theirs - adapted).max(), np.abs(adapted - bare).max()
    print(f"{family}: difference {difference:.1e}, effect {effect:.2f}")
    assert effect > 0.1
    assert difference < 1e-4


def test_transformers_opens_the_adapter_folder_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds the base model by the id in the folder: here a folder of that name."""
    model = tiny.make_folder(tmp_path / "acme" / "tiny", bits=None, **FAMILIES["qwen3"])
    adapter = stirred_adapter(model, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    theirs = torch_logits(hf_model(adapter))
    assert np.abs(theirs - mlx_logits(model, adapter)).max() < 1e-4


def test_peft_reads_the_folder_without_the_name_of_a_base_model(tmp_path: Path) -> None:
    model = tiny.make_folder(tmp_path / "model", bits=None, **FAMILIES["qwen3"])
    policy = make_policy(load_model(model), rank=4, scale=1.0, seed=0, for_cpu=True, dense=True)
    tiny.stir(policy.model, seed=1, size=0.3)
    write_adapter(adapter_of(policy.model), tmp_path / "adapter")
    theirs = torch_logits(PeftModel.from_pretrained(hf_model(model), tmp_path / "adapter"))
    assert np.abs(theirs - mlx_logits(model, tmp_path / "adapter")).max() < 1e-4


def test_a_transposed_adapter_would_be_found_out(tmp_path: Path) -> None:
    """Square layers load without an error when they are not transposed: the logits must tell."""
    from safetensors.torch import load_file, save_file

    model = tiny.make_folder(tmp_path / "model", bits=None, **FAMILIES["llama, other sizes"])
    adapter = stirred_adapter(model, tmp_path / "adapter", keys=("self_attn.q_proj",))
    weights = load_file(adapter / "adapter_model.safetensors")
    swapped = {
        name: weights[_other_half(name)].T.contiguous() for name in weights
    }  # A takes B's place: all shapes are those that PEFT expects
    save_file(swapped, adapter / "adapter_model.safetensors", {"format": "pt"})
    theirs = torch_logits(PeftModel.from_pretrained(hf_model(model), adapter))
    assert np.abs(theirs - mlx_logits(model, adapter)).max() > 0.1


def _other_half(name: str) -> str:
    return name.replace("lora_A", "*").replace("lora_B", "lora_A").replace("*", "lora_B")


# A real run on the embedded model, from the command line to transformers.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    command = [Path(sys.executable).with_name("localrl"), "train", "--steps", "5"]
    options = ["--out", str(out), "--set", "task.eval_prompts=0"]
    subprocess.run([*command, *options], check=True, capture_output=True, timeout=500)
    return out / "adapter"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model without quantisation, as transformers reads it."""
    folder = tmp_path_factory.mktemp("models") / "unpacked"
    source = embedded_model_path()
    model = load_model(source).model
    for path, module in model.named_modules():
        if hasattr(module, "scales"):
            model.update_modules(tree_unflatten([(path, _dense(module))]))
    model.set_dtype(mx.float32)
    save_model(folder, model)
    config = json.loads((source / "config.json").read_text())
    del config["quantization"]
    (folder / "config.json").write_text(json.dumps(config))
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _dense(module: Any) -> nn.Module:
    weight = mx.dequantize(
        module.weight, module.scales, module.biases, module.group_size, module.bits
    )
    rows, columns = weight.shape
    embedding = isinstance(module, nn.QuantizedEmbedding)
    made = nn.Embedding(rows, columns) if embedding else nn.Linear(columns, rows, bias=False)
    made.weight = weight
    return made


def test_a_trained_adapter_reloads_in_mlx_lm_with_difference_zero(trained: Path) -> None:
    """On the quantised model that it was trained on; the logits are localrl's to the last bit."""
    saved = read_adapter(trained)
    assert max(float(mx.abs(saved.weights[n]).max()) for n in saved.weights if "lora_b" in n) > 0
    model = embedded_model_path()
    policy = make_policy(
        load_model(model),
        rank=saved.rank,
        scale=saved.scale,
        seed=9,
        for_cpu=False,
        dense=False,
        weights=saved.weights,
    )
    own = np.array(policy.model(mx.array(TOKENS)))
    assert np.abs(mlx_logits(model, trained) - own).max() == 0
    assert np.abs(mlx_logits(model) - own).max() > 0.1


def test_a_trained_adapter_gives_the_same_in_transformers(trained: Path, unpacked: Path) -> None:
    bare, adapted = mlx_logits(unpacked), mlx_logits(unpacked, trained)
    quantised = mlx_logits(embedded_model_path(), trained)
    model = PeftModel.from_pretrained(hf_model(unpacked), trained)
    theirs = torch_logits(model)
    difference, effect = np.abs(theirs - adapted).max(), np.abs(adapted - bare).max()
    packed = np.abs(theirs - quantised).max()
    print(f"trained: difference {difference:.1e} ({packed:.1e} packed), effect {effect:.2f}")
    assert effect > 0.1
    assert max(difference, packed) < 1e-4
    assert _greedy_torch(model, TOKENS[0]) == _greedy_mlx(unpacked, trained, TOKENS[0])


def _greedy_torch(model: Any, prompt: Sequence[int]) -> list[int]:
    made = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    return made[0, len(prompt) :].tolist()


def _greedy_mlx(model: Path, adapter: Path, prompt: Sequence[int]) -> list[int]:
    from mlx_lm.generate import generate_step

    loaded, tokenizer = mlx_lm.load(str(model), adapter_path=str(adapter))[:2]
    tokens: list[int] = []
    for token, _ in generate_step(mx.array(prompt), loaded, max_tokens=24):
        tokens.append(int(token))
        if int(token) in tokenizer.eos_token_ids:
            break
    return tokens
