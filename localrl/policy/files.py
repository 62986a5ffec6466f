"""File patterns of a model's repository, for fetching and for the Hub client's cache."""

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
"""mlx-lm's patterns without `*.py`: everything needed to load a model, and no code. Anything that
mlx-lm or `localrl pull` fetched is complete by these patterns."""

README = "README.md"
"""The model card: fetched with the model files, never required."""
