"""A real GRPOTrainer on a tiny model that is told its completions: what it makes of rewards."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

PAD, END, CHARACTERS = "<pad>", "<end>", string.printable


@dataclass(frozen=True)
class Row:
    """One row of a dataset, and what is answered to its prompt."""

    prompt: Any
    completions: tuple[str, ...]
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Scored:
    """What TRL made of the completions of one step, None for its NaN."""

    parts: list[list[float | None]]
    """By completion, then by function."""
    advantages: list[float]
    """Reward minus the mean of the group; 0 for a completion that no function judged."""
    logged: Mapping[str, Any]
    extra: Mapping[str, list[Any]]


def tokens_of(text: str) -> list[int]:
    """One token for each character, and the end token."""
    return [2 + CHARACTERS.index(character) for character in text] + [1]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([PAD, END, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    made.chat_template = tiny.TEMPLATE
    return made


def run_trl(
    folder: Path,
    rows: Sequence[Row],
    functions: Sequence[Callable[..., Any]],
    *,
    weights: Sequence[float] | None = None,
    steps: int = 1,
) -> list[Scored]:
    """Train for some steps on all rows; one `Scored` for each step."""
    group = len(rows[0].completions)
    turns = {str(row.prompt): row.completions for row in rows}

    def answer(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        count: dict[str, int] = {}
        ids = []
        for prompt in prompts:
            turn = count[str(prompt)] = count.get(str(prompt), -1) + 1
            ids.append(tokens_of(turns[str(prompt)][turn]))
        return {"prompt_ids": [[2]] * len(prompts), "completion_ids": ids, "logprobs": None}

    trainer = GRPOTrainer(
        model=str(_make_model(folder / "model")),
        processing_class=make_tokenizer(),
        reward_funcs=list(functions),
        args=_settings(folder, len(rows) * group, group, steps, weights),
        train_dataset=Dataset.from_list([{"prompt": r.prompt, **r.columns} for r in rows]),
        rollout_func=answer,
    )
    parts, results = _recorded(trainer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    extra = {name: list(values) for name, values in trainer._logs["extra"].items()}
    return [
        Scored(_without_nan(p), result["advantages"].tolist(), logged, extra)
        for p, result, logged in zip(parts, results, history, strict=True)
    ]


def _make_model(folder: Path) -> Path:
    named = {"architectures": ["Qwen3ForCausalLM"], "eos_token_id": 1}
    return tiny.make_folder(folder, bits=None, vocab_size=128, **named)


def _settings(
    folder: Path, batch: int, group: int, steps: int, weights: Sequence[float] | None
) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=batch,
        num_generations=group,
        max_completion_length=512,
        shuffle_dataset=False,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        scale_rewards="none",
        reward_weights=None if weights is None else list(weights),
    )


def _recorded(trainer: Any) -> tuple[list[Any], list[Any]]:
    """Fills with what two of the trainer's own steps return."""
    parts: list[Any] = []
    results: list[Any] = []

    def recording(step: Callable[..., Any], to: list[Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any) -> Any:
            to.append(step(*arguments))
            return to[-1]

        return recorded

    trainer._calculate_rewards = recording(trainer._calculate_rewards, parts)
    trainer._generate_and_score_completions = recording(
        trainer._generate_and_score_completions, results
    )
    return parts, results


def _without_nan(rewards: Any) -> list[list[float | None]]:
    return [[None if math.isnan(part) else part for part in row] for row in rewards.tolist()]
