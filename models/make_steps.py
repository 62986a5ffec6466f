"""Make the embedded model `steps-0.8m` again, from a seed, on a CPU.

    python models/make_steps.py            train, quantise, measure, write models/steps-0.8m

Supervised training in float32 on `traces.py`; the last part sees the weights as 4 bits will store
them (straight-through gradient), so that quantising costs nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from localrl.backend import mx, nn, optim  # first, since it prepares the process for MLX

# isort: split
import click
import fast_cpu
import numpy as np
from check_steps import measure
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import qwen3
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
QUANTIZATION: dict[str, Any] = {"group_size": 32, "bits": 4}

STEPS = 2400
WORKING_STEPS = 1000
"""Steps at the start whose texts guess less, so that working is learned first and best."""
WORKING_GUESS_RATE = 0.2
QUANTISED_STEPS = 600
"""Steps at the end that see the weights as 4 bits store them."""
BATCH = 32
MUON_LR = 0.02
ADAMW_LR = 3e-3
WARMUP = 100
SEED = 0

Params = Any
"""A tree of arrays, as `nn.Module.parameters` returns it."""


def encode(text: str) -> list[int]:
    """Token ids of plain characters."""
    return [VOCABULARY.index(c) for c in text]


def batch(step: int) -> tuple[mx.array, mx.array]:
    """Tokens and loss mask of one step: (B, L) int32, (B, L - 1) float32 over targets."""
    guess_rate = WORKING_GUESS_RATE if step < WORKING_STEPS else GUESS_RATE
    rows = []
    for index in range(step * BATCH, (step + 1) * BATCH):
        prompt, completion = training_text(index, guess_rate)
        head = [VOCABULARY.index("<|user|>"), *encode(prompt), VOCABULARY.index("<|assistant|>")]
        rows.append((head, [*encode(completion), VOCABULARY.index(END)]))
    width = max(len(head) + len(tail) for head, tail in rows)
    tokens = np.zeros((BATCH, width), np.int32)
    mask = np.zeros((BATCH, width - 1), np.float32)
    for row, (head, tail) in enumerate(rows):
        tokens[row, : len(head) + len(tail)] = head + tail
        mask[row, len(head) - 1 : len(head) + len(tail) - 1] = 1.0
    return mx.array(tokens), mx.array(mask)


def as_stored(weight: mx.array) -> mx.array:
    """The weight as 4 bits will store it; its gradient passes straight through."""
    if weight.ndim != 2:
        return weight
    stored = mx.dequantize(*mx.quantize(mx.stop_gradient(weight), **QUANTIZATION), **QUANTIZATION)
    return weight + mx.stop_gradient(stored - weight)


def loss_fn(
    params: Params, model: nn.Module, quantised: bool, tokens: mx.array, mask: mx.array
) -> mx.array:
    """Mean cross-entropy per completion token, in nats."""
    model.update(tree_map(as_stored, params) if quantised else params)
    logits = model(tokens[:, :-1])  # (B, L-1, V)
    losses = nn.losses.cross_entropy(logits, tokens[:, 1:])
    return (losses * mask).sum() / mask.sum()


def schedule(peak: float) -> Callable[[mx.array], mx.array]:
    """Linear warm-up to the peak, then half a cosine down to a hundredth of it."""
    warmup = optim.linear_schedule(1e-7, peak, WARMUP)
    decay = optim.cosine_decay(peak, STEPS - WARMUP, peak / 100)
    return optim.join_schedules([warmup, decay], [WARMUP])


def make_optimizer() -> optim.Optimizer:
    """Muon (Jordan, 2024) for the matrices inside the layers, AdamW for embedding and norms."""
    muon = optim.Muon(schedule(MUON_LR), weight_decay=0.0)
    adamw = optim.AdamW(schedule(ADAMW_LR), betas=[0.9, 0.98], weight_decay=0.01)
    return optim.MultiOptimizer([muon, adamw], [lambda path, p: "layers" in path and p.ndim == 2])


def train(report_every: int = 100) -> qwen3.Model:
    """Train from the seed; the result has float32 weights, made for `QUANTIZATION`."""
    mx.random.seed(SEED)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(CONFIG))
    optimizer = make_optimizer()
    params = tree_map(lambda p: p.astype(mx.float32), model.parameters())
    started = time.monotonic()
    for step in range(STEPS):
        quantised = step >= STEPS - QUANTISED_STEPS
        grad = mx.value_and_grad(partial(loss_fn, model=model, quantised=quantised))
        tokens, mask = batch(step)
        loss, grads = grad(params, tokens=tokens, mask=mask)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        params = optimizer.apply_gradients(grads, params)
        mx.eval(params, optimizer.state, loss)
        if step % report_every == 0 or step == STEPS - 1:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step:5d}  loss {loss.item():.4f}  {minutes:.1f} min", flush=True)
    model.update(params)
    return model


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
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIAL[0],
        "pad_token": END,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_model(model: qwen3.Model, folder: Path) -> None:
    """Quantise and write the weights and their configuration."""
    nn.quantize(model, **QUANTIZATION)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_json(folder / "config.json", CONFIG | {"quantization": QUANTIZATION})
    write_json(folder / "generation_config.json", {"eos_token_id": CONFIG["eos_token_id"]})


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
            model = train()
        write_tokenizer(target)
        write_model(model, target)
    card = measure(target)
    (target / "README.md").write_text(card)
    if target != out:
        if out.exists():
            out.rename(out.with_name(f"{out.name}.old-{int(time.time())}"))
        target.rename(out)


if __name__ == "__main__":
    main()
