"""Make the model `turns-0.1m` again, from a seed, on a CPU: it talks in turns and calls a tool.

    python models/make_turns.py            train, quantise, measure, write models/turns-0.1m

Supervised training in float32 on `talks.py`, see `training.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localrl.backend import mx  # first, since it prepares the process for MLX

# isort: split
import click
import fast_cpu
import numpy as np
from check_turns import measure
from mlx_lm.models import qwen3
from talks import CALL_RATE, HEED_RATE, training_talk
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from training import (
    SEED,
    Batch,
    put_in_place,
    to_batch,
    train,
    write_model,
    write_tokenizer_config,
)

from localrl.tasks.guessing import LARGEST, REPEAT, RULES

NAME = "turns-0.1m"
SPECIAL = ("<|unk|>", "<|user|>", "<|tool|>", "<|assistant|>", "<|end|>")
END = "<|end|>"
PHRASES = (
    "I am thinking of a whole number from ",
    " to ",
    ": ",
    f". {RULES}",
    f"{REPEAT} from ",
    "higher",
    "lower",
    "What is ",
    " times ",
    "<tool_call>",
    "</tool_call>",
    '{"name": "calculate", "arguments": {"expression": "',
    '"}}',
)
"""Texts that are one token each; decoding keeps them."""
NUMBERS = (*map(str, range(10)), *(f"{n:02d}" for n in range(100)))
"""Digits are read in pairs from the left: 3995 is 39 95, and 399 is 39 9."""
CHARACTERS = ("\n", *(c for c in map(chr, range(32, 127)) if not c.isdigit()))
VOCABULARY = (*SPECIAL, *PHRASES, *NUMBERS, *CHARACTERS)
# It does not list `tools`: the model knows its one tool from training.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>{{ m.content or '' }}"
    "{% for tool_call in m.tool_calls or [] %}"
    "{% set tool_call = tool_call.function or tool_call %}"
    '<tool_call>{"name": "{{ tool_call.name }}", "arguments": '
    "{{ tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}"
    "}</tool_call>"
    "{% endfor %}<|end|>"
    "{% elif m.role == 'tool' %}<|tool|>{{ m.content }}"
    "{% else %}<|user|>{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
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
STEPS = 1300
ABLE_STEPS = 800
"""Steps at the start whose texts heed and call more, so that both are learned first and best."""
ABLE_RATES = (0.8, 0.8)
QUANTISED_STEPS = 500
"""Steps at the end that see the weights as 4 bits store them."""
BATCH = 64


def make_tokenizer() -> Tokenizer:
    """Pairs of digits, a few phrases, and every other character its own token."""
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9]{1,2}|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PHRASES])
    return tokenizer


def order_numbers(model: qwen3.Model) -> None:
    """Let numbers that are close begin with embeddings that are: waves over 1 to 99.

    Their order is learned in a fraction of the steps that random embeddings need.
    """
    rng = np.random.default_rng(SEED)
    embedding = np.array(model.model.embed_tokens.weight)
    width = embedding.shape[1]
    waves = np.exp(rng.uniform(np.log(0.02), np.log(2.0), width))  # radians from number to number
    phases = rng.uniform(0, 2 * np.pi, width)
    for number in range(1, LARGEST + 1):
        row = np.cos(waves * number + phases) * np.sqrt(2 / width)
        embedding[VOCABULARY.index(str(number))] = row
    model.model.embed_tokens.weight = mx.array(embedding)


def make_batch(tokenizer: Tokenizer, step: int) -> Batch:
    """The texts of one step."""
    rates = ABLE_RATES if step < ABLE_STEPS else (HEED_RATE, CALL_RATE)
    talks = [training_talk(i, *rates) for i in range(step * BATCH, (step + 1) * BATCH)]
    return to_batch([[(tokenizer.encode(t).ids, learned) for t, learned in talk] for talk in talks])


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, its config and the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
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
        tokenizer = make_tokenizer()
        with fast_cpu.installed():
            model = train(
                CONFIG,
                lambda step: make_batch(tokenizer, step),
                steps=STEPS,
                quantised_steps=QUANTISED_STEPS,
                prepare=order_numbers,
            )
        write_tokenizer(tokenizer, target)
        write_model(model, target, CONFIG)
    (target / "README.md").write_text(measure(target))
    put_in_place(target, out)


if __name__ == "__main__":
    main()
