"""Make the embedded model `steps-0.8m` again, from a seed, on a CPU.

    python models/make_steps.py            train, quantise, measure, write models/steps-0.8m

Supervised training in float32 on `traces.py`; the last part sees the weights as 4 bits will store
them (straight-through gradient), so that quantising costs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# First, since it prepares the process for MLX.
from training import Batch, put_in_place, to_batch, train, write_model, write_tokenizer_config

# isort: split
import click
import fast_cpu
from check_steps import measure
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from traces import GUESS_RATE, training_text

NAME = "steps-0.8m"
SPECIAL = ("<|unk|>", "<|user|>", "<|assistant|>", "<|end|>")
END = "<|end|>"
CHARACTERS = " 0123456789abcdefghijklmnopqrstuvwxyz+=?>;#"
VOCABULARY = (*SPECIAL, *CHARACTERS)
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY.index(END),
    "torch_dtype": "float32",
}
STEPS = 2400
WORKING_STEPS = 1000
"""Steps at the start whose texts guess less, so that working is learned first and best."""
WORKING_GUESS_RATE = 0.2
QUANTISED_STEPS = 600
"""Steps at the end that see the weights as 4 bits store them."""
BATCH = 32


def encode(text: str) -> list[int]:
    """Token ids of plain characters."""
    return [VOCABULARY.index(c) for c in text]


def batch(step: int, working_steps: int = WORKING_STEPS) -> Batch:
    """The texts of one step."""
    guess_rate = WORKING_GUESS_RATE if step < working_steps else GUESS_RATE
    rows = []
    for index in range(step * BATCH, (step + 1) * BATCH):
        prompt, completion = training_text(index, guess_rate)
        head = [VOCABULARY.index("<|user|>"), *encode(prompt), VOCABULARY.index("<|assistant|>")]
        rows.append([(head, False), ([*encode(completion), VOCABULARY.index(END)], True)])
    return to_batch(rows)


def make_tokenizer() -> Tokenizer:
    """A character tokenizer: every character its own token, nothing added, nothing lost."""
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, its config and the chat template."""
    make_tokenizer().save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder, SPECIAL[0], END, CONFIG["max_position_embeddings"])
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / NAME)
@click.option("--measure-only", is_flag=True, help="Keep the weights; measure and write the card.")
def main(out: Path, measure_only: bool) -> None:
    """Make the folder next to its final place, then move it there in one rename."""
    target = out
    if not measure_only:
        target = out.with_name(out.name + ".new")
        target.mkdir(parents=True, exist_ok=True)
        with fast_cpu.installed():
            model = train(CONFIG, batch, steps=STEPS, quantised_steps=QUANTISED_STEPS)
        write_tokenizer(target)
        write_model(model, target, CONFIG)
    card = measure(target)
    (target / "README.md").write_text(card)
    put_in_place(target, out)


if __name__ == "__main__":
    main()
