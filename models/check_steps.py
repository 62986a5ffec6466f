"""Sample the embedded model on held-out prompts and say what it does, as the text of its card."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.backend import mx  # first, since it prepares the process for MLX

# isort: split
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model, load
from traces import GUESS, GUESS_RATE

from localrl.records import Example
from localrl.rewards.answers import stated_answer
from localrl.tasks.builtin import load_task

PROMPTS = 2048
ROWS = 256
MAX_TOKENS = 64
FIRST = 4
"""Tokens that must not hold most of the entropy."""


@dataclass(frozen=True)
class Sample:
    """One completion of one example; the end token is counted in `entropies`, not in `text`."""

    example: Example
    text: str
    entropies: np.ndarray  # (T,) nats

    @property
    def right(self) -> bool:
        """Whether the final answer is the gold one."""
        return stated_answer(self.text) == self.example.answer

    @property
    def guesses(self) -> int:
        """Number of steps that were guessed."""
        return self.text.count(GUESS)

    @property
    def kind(self) -> str:
        """Family and difficulty."""
        return f"{self.example.columns['family']} {self.example.columns['difficulty']}"


def load_float(folder: Path) -> tuple[Any, Any]:
    """The shipped 4-bit weights as float32 matrices (faster for batches on a CPU), and tokenizer.

    No value changes: dequantised weights are what the 4-bit matrix product multiplies with.
    """
    if mx.default_device() == mx.cpu:
        mx.disable_compile()  # there it calls a C++ compiler: half a minute at first use
    model, tokenizer = load(str(folder))[:2]
    return dequantize_model(model), tokenizer


def sample(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    seed: int,
    temperature: float = 1.0,
    banned: str = "",
) -> list[Sample]:
    """One completion per example, at temperature 1 (or greedy at 0), in the order of `examples`.

    Prompts of one length are decoded together, so nothing is padded. Characters in `banned` are
    never drawn: with the guess mark banned every step is worked.
    """
    rows = [tokenizer.apply_chat_template(e.messages, add_generation_prompt=True) for e in examples]
    by_length = defaultdict(list)
    for i, ids in enumerate(rows):
        by_length[len(ids)].append(i)
    chunks = [c[i : i + ROWS] for c in by_length.values() for i in range(0, len(c), ROWS)]
    found: dict[int, Sample] = {}
    for chunk, key in zip(chunks, mx.random.split(mx.random.key(seed), len(chunks)), strict=True):
        bias = np.zeros(model.args.vocab_size, np.float32)
        bias[[tokenizer.convert_tokens_to_ids(c) for c in banned]] = -np.inf
        prompts = mx.array([rows[i] for i in chunk])
        end_id = tokenizer.eos_token_id
        tokens, entropies = decode(model, prompts, end_id, key, temperature, mx.array(bias))
        for i, ids, row in zip(chunk, tokens.tolist(), entropies, strict=True):
            end = ids.index(end_id) if end_id in ids else len(ids)
            text = tokenizer.decode(ids[:end])
            found[i] = Sample(examples[i], text, row[: end + 1])
    return [found[i] for i in range(len(examples))]


def decode(
    model: Any, prompts: mx.array, end_id: int, key: mx.array, temperature: float, bias: mx.array
) -> tuple[np.ndarray, np.ndarray]:
    """Continue (B, P) prompts until all have ended: token ids and entropies, both (B, T)."""
    cache = make_prompt_cache(model)
    ended = mx.zeros(len(prompts), dtype=mx.bool_)
    tokens, entropies, inputs = [], [], prompts
    for step_key in mx.random.split(key, MAX_TOKENS):
        logits = model(inputs, cache=cache)[:, -1].astype(mx.float32) + bias  # (B, V)
        logprobs = logits - mx.logsumexp(logits, -1, keepdims=True)
        drawn = mx.random.categorical(logprobs, key=step_key) if temperature else logits.argmax(-1)
        terms = mx.exp(logprobs) * mx.maximum(logprobs, -1e4)  # (B, V); 0 where never drawn
        tokens.append(drawn)
        entropies.append(-terms.sum(-1))
        inputs, ended = drawn[:, None], ended | (drawn == end_id)
        if ended.all().item():
            break
    return np.array(mx.stack(tokens, 1)), np.array(mx.stack(entropies, 1))


def count_parameters(model: Any) -> int:
    """Number of weights, shared ones once."""
    return sum(int(p.size) for p in dict(tree_flatten(model.parameters())).values())


def accuracy(samples: Iterable[Sample]) -> float:
    """Share of right answers."""
    return float(np.mean([s.right for s in samples]))


def first_share(samples: Sequence[Sample]) -> float:
    """Share of all token entropy that lies in the first `FIRST` tokens."""
    total = sum(float(s.entropies.sum()) for s in samples)
    return sum(float(s.entropies[:FIRST].sum()) for s in samples) / total


def grouped(
    samples: Iterable[Sample], key: Callable[[Sample], Any]
) -> list[tuple[Any, list[Sample]]]:
    """Samples by key, in order of the keys."""
    groups = defaultdict(list)
    for s in samples:
        groups[key(s)].append(s)
    return sorted(groups.items())


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.1f} %"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def kinds_table(free: list[Sample], worked: list[Sample], greedy: list[Sample]) -> str:
    """Accuracy by family and difficulty, as sampled, with every step worked, and greedy."""
    columns = [dict(grouped(samples, lambda s: s.kind)) for samples in (free, worked, greedy)]
    rows = [
        [kind, len(columns[0][kind]), *(percent(accuracy(column[kind])) for column in columns)]
        for kind in columns[0]
    ]
    rows.append(["all", len(free), *(percent(accuracy(s)) for s in (free, worked, greedy))])
    return table(["task", "prompts", "temperature 1", "every step worked", "greedy"], rows)


def strategy_table(free: list[Sample]) -> str:
    """Accuracy by the number of guessed steps."""
    rows = [
        [f"{n}" if n < 3 else "3 or more", percent(len(part) / len(free)), percent(accuracy(part))]
        for n, part in grouped(free, lambda s: min(s.guesses, 3))
    ]
    return table(["guessed steps", "share of completions", "right"], rows)


def entropy_table(free: list[Sample], width: int = 4) -> str:
    """Mean entropy by position, over the completions that reach it."""
    rows = []
    for start in range(0, MAX_TOKENS, width):
        spans = [s.entropies[start : start + width] for s in free]
        values = np.concatenate(spans)
        if len(values):
            share = values.sum() / sum(s.entropies.sum() for s in free)
            rows.append([f"{start + 1}-{start + width}", f"{values.mean():.3f}", percent(share)])
    return table(["tokens", "mean entropy (nats)", "share of all entropy"], rows)


def measure(folder: Path) -> str:
    """Sample the model in `folder` and return its card."""
    model, tokenizer = load_float(folder)
    examples = load_task("steps", train_prompts=0).evaluation(PROMPTS)
    free = sample(model, tokenizer, examples, seed=1)
    worked = sample(model, tokenizer, examples, seed=2, banned=GUESS)
    greedy = sample(model, tokenizer, examples, seed=3, temperature=0.0)
    lengths = np.array([len(s.entropies) for s in free])
    files = [f for f in folder.iterdir() if f.name != "README.md"]
    template = (Path(__file__).parent / "card.md").read_text()
    card = template.format(
        name=folder.name.removesuffix(".new"),
        parameters=f"{count_parameters(model):,}",
        kilobytes=round(sum(f.stat().st_size for f in files) / 1000),
        guess_rate=percent(GUESS_RATE),
        prompts=PROMPTS,
        accuracy=percent(accuracy(free)),
        worked=percent(accuracy(worked)),
        kinds=kinds_table(free, worked, greedy),
        strategies=strategy_table(free),
        entropies=entropy_table(free),
        first=percent(first_share(free)),
        mean_length=f"{lengths.mean():.1f}",
        worked_length=f"{np.mean([len(s.entropies) for s in worked]):.1f}",
        in_range=percent(float(np.mean((lengths >= 24) & (lengths <= 64)))),
        longest=lengths.max(),
    )
    print(card)
    return card
