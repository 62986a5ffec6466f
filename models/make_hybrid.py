"""Make a small hybrid that guesses at the task `steps`, to see whether training teaches it.

    python models/make_hybrid.py qwen3_5 FOLDER
    python models/make_hybrid.py gemma4_text FOLDER

Supervised training as for `steps-0.8m`, on the same texts, without its prepared CPU functions and
with more steps, since these learn to add more slowly. These models are not shipped:
`benchmarks/hybrids.md` says what came of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

# First, since it prepares the process for MLX.
from training import train, write_model

# isort: split
import click
from make_steps import CONFIG, SPECIAL, VOCABULARY, batch, write_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from localrl.engines.mlx.recurrent import use_chunks

SIZES = {name: value for name, value in CONFIG.items() if name not in ("architectures",)}
FAMILIES: dict[str, dict[str, Any]] = {
    # Gated delta nets and attention in turn, and all dimensions of a head rotated: with one layer
    # of attention in four and a quarter of them, as in the published models, a model this small
    # does not learn to add.
    "qwen3_5": {
        "model_type": "qwen3_5",
        "eos_token_id": CONFIG["eos_token_id"],
        "text_config": SIZES
        | {
            "model_type": "qwen3_5_text",
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 2,
            "rope_parameters": {
                "type": "default",
                "rope_theta": CONFIG["rope_theta"],
                "partial_rotary_factor": 1.0,
            },
        },
    },
    # Windows of 48 tokens and full attention in turn, the last layer with another's keys and
    # values, embeddings per layer: 0.80 M weights.
    "gemma4_text": SIZES
    | {
        "model_type": "gemma4_text",
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 1,
        "intermediate_size": 256,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": CONFIG["vocab_size"],
        "global_head_dim": 32,
        "sliding_window": 48,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 30.0,
        "pad_token_id": 0,
        "rope_parameters": None,
    },
}
STEPS, QUANTISED_STEPS = 3600, 600
WORKING_STEPS = 2000


def write_byte_tokenizer(folder: Path) -> None:
    """Write the embedded model's characters as a byte-level BPE without merges.

    For the model type qwen3_5, transformers splits texts as Qwen's tokenizer does, whatever
    tokenizer.json says, and would drop the embedded model's spaces.
    """
    write_tokenizer(folder)
    names = ["\u0120" if token == " " else token for token in VOCABULARY]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))


@click.command(help=__doc__)
@click.argument("family", type=click.Choice(list(FAMILIES)))
@click.argument("out", type=click.Path(path_type=Path))
def main(family: str, out: Path) -> None:
    """Train, quantise and write the model."""
    out.mkdir(parents=True)
    config = FAMILIES[family]
    texts = partial(batch, working_steps=WORKING_STEPS)
    model = train(config, texts, steps=STEPS, quantised_steps=QUANTISED_STEPS, prepare=use_chunks)
    write_byte_tokenizer(out)
    write_model(model, out, config)


if __name__ == "__main__":
    main()
