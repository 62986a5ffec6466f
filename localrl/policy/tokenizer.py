"""Text to token ids and back; the only place that knows chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.errors import ConfigError

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Tokenizer:
    """mlx-lm's tokenizer of a model, used in the one way that training needs."""

    inner: Any
    end_ids: frozenset[int]
    """Tokens that end a completion."""

    def render(self, messages: Messages) -> str:
        """The text the model is given: the chat template up to where it writes."""
        if self.inner.chat_template is None:
            return "\n".join(message["content"] for message in messages)
        chat = [dict(message) for message in messages]
        return self.inner.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def encode(self, messages: Messages) -> tuple[int, ...]:
        """Prompt ids. Special tokens come from the template alone."""
        return tuple(self.inner.encode(self.render(messages), add_special_tokens=False))

    def unknown(self, messages: Messages) -> str:
        """Characters of the messages that the model has no token for."""
        token = self.inner.unk_token_id
        if token is None or token not in self.encode(messages):
            return ""
        characters = dict.fromkeys("".join(message["content"] for message in messages))
        return "".join(
            c for c in characters if token in self.inner.encode(c, add_special_tokens=False)
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion, without special tokens."""
        return self.inner.decode(list(token_ids), skip_special_tokens=True)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model folder; never touches the network or runs the folder's code.

    Raises: ConfigError when there is none, or when it names no end token.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load

    try:
        ends = load_config(folder).get("eos_token_id")
        inner = load(folder, {"trust_remote_code": False}, eos_token_ids=ends)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"Cannot load the tokenizer in {folder}: {error}") from error
    ends = frozenset(int(token) for token in inner.eos_token_ids)
    if not ends:
        raise ConfigError(f"The tokenizer in {folder} names no end token, so nothing would stop.")
    return Tokenizer(inner, ends)
