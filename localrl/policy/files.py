"""Which files of a model's repository are taken, and looked for in the Hub client's cache."""

from __future__ import annotations

MODEL_FILES: tuple[str, ...] = (
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
)
"""mlx-lm's patterns without `*.py`: what a model needs to be loaded, and no code. Whatever mlx-lm
or `localrl pull` has fetched is complete by these patterns."""

README = "README.md"
"""The model card: pulled beside them, never needed."""
