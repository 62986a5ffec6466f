"""A random Qwen3 of 7.3 million weights, and prompts of an exact length, in a folder.

    python benchmarks/peers/make_model.py FOLDER

Words are tokens: "w17" is one. transformers and mlx-lm read the same file of weights.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from localrl.backend import mx, tree_flatten

VOCABULARY = 4096
SPECIAL = ("<pad>", "<end>", "<user>", "<assistant>")
TEMPLATE = (
    "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
AROUND = 2
"""Tokens that the template adds to a prompt."""
PROMPTS = {"short": 20, "long": 500}
"""Tokens of each job's prompts, the template's included."""
ROWS = 64
CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def make(folder: Path) -> None:
    """Write FOLDER/model and FOLDER/<job>.jsonl."""
    _weights(folder / "model")
    _tokenizer(folder / "model")
    for job, length in PROMPTS.items():
        draws = random.Random(job)
        words = VOCABULARY - len(SPECIAL)
        rows = [
            {"prompt": " ".join(f"w{draws.randrange(words)}" for _ in range(length - AROUND))}
            for _ in range(ROWS)
        ]
        text = "".join(json.dumps({**row, "answer": ""}) + "\n" for row in rows)
        (folder / f"{job}.jsonl").write_text(text)


def _weights(folder: Path) -> None:
    from mlx_lm.models.qwen3 import Model, ModelArgs

    folder.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(CONFIG))
    weights = dict(tree_flatten(model.parameters()))
    # The scale that transformers starts from; norms stay 1.
    weights = {
        name: 0.02 * mx.random.normal(array.shape) if array.ndim > 1 else array
        for name, array in weights.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))


def _tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = [f"w{n}" for n in range(VOCABULARY - len(SPECIAL))]
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "unk_token": "<pad>",
        "padding_side": "left",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
