"""Text to token ids and back; the only place that knows how a model wants its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localrl.errors import ConfigError
from localrl.policy.chat import ChatTemplate, Messages, Tools, thinking_switch
from localrl.policy.folder import check_texts

UNFINISHED = "\ufffd"
"""What tokenizers write for bytes that are no character."""
MOST_OPEN = 8
"""Tokens that are waited for to make up a character, which has at most four bytes."""


@dataclass(frozen=True)
class Tokenizer:
    """mlx-lm's tokenizer of a model, used in the one way that training needs."""

    inner: Any
    end_ids: frozenset[int]
    """Tokens that end a completion."""
    chat: ChatTemplate | None = None
    """None where the folder has no template: contents are joined by line ends, or a family's own
    Python in mlx-lm writes them."""
    _known: dict[int, str] = field(default_factory=dict, repr=False, compare=False)
    """Texts of single tokens that `pieces` has met."""

    def render(
        self, messages: Messages, *, tools: Tools | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The text the model is given: the chat template, by default up to where it writes.

        tools: JSON schemas of what the model may call.

        Raises: DataError or ConfigError, see `ChatTemplate.render`.
        """
        return self.render_all([messages], tools, add_generation_prompt)[0]

    def render_all(
        self,
        conversations: Sequence[Messages],
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> list[str]:
        """As `render`, for many conversations at once, which is faster."""
        if self.chat is not None:
            return self.chat.render(
                conversations, tools=tools, add_generation_prompt=add_generation_prompt
            )
        if not self.inner.has_chat_template:
            return ["\n".join(map(_content, messages)) for messages in conversations]
        return [
            self.inner.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
            for messages in conversations
        ]

    def encode(self, messages: Messages, *, tools: Tools | None = None) -> tuple[int, ...]:
        """Prompt ids. Special tokens come from the template alone."""
        return self.encode_text(self.render(messages, tools=tools))

    def encode_all(self, conversations: Sequence[Messages]) -> list[tuple[int, ...]]:
        """As `encode`, for many conversations at once, which is faster."""
        return [self.encode_text(text) for text in self.render_all(conversations)]

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of a rendered text, with no special token added to it."""
        return tuple(self.inner.encode(text, add_special_tokens=False))

    def unknown(self, messages: Messages) -> str:
        """Characters of the messages that the model has no token for."""
        token = self.inner.unk_token_id
        if token is None or token not in self.encode(messages):
            return ""
        characters = dict.fromkeys("".join(map(_content, messages)))
        return "".join(c for c in characters if token in self.encode_text(c))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion, without special tokens."""
        return self.inner.decode(list(token_ids), skip_special_tokens=True)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text that each token adds, special tokens by their names; for people only.

        Of a character that several tokens make up, the last one has the text and the others have
        none. Bytes that never become a character are U+FFFD, as in the whole text.
        """
        texts, open_ids = [""] * len(token_ids), []
        for i, token in enumerate(map(int, token_ids)):
            text = self._piece(token)
            if UNFINISHED not in text:
                if open_ids:
                    texts[i - 1], open_ids = self._plain(open_ids), []
                texts[i] = text
                continue
            open_ids.append(token)
            text = self._plain(open_ids)
            if not text.endswith(UNFINISHED) or len(open_ids) == MOST_OPEN:
                texts[i], open_ids = text, []
        if open_ids:
            texts[-1] = self._plain(open_ids)
        return texts

    def _piece(self, token: int) -> str:
        if token not in self._known:
            # Doubled, since some tokenizers take away the space that a text begins with.
            once, twice = self._plain([token]), self._plain([token, token])
            self._known[token] = twice[len(once) :] if twice.startswith(once) else once
        return self._known[token]

    def _plain(self, token_ids: list[int]) -> str:
        return self.inner.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def load_tokenizer(folder: Path, *, thinking: str = "auto") -> Tokenizer:
    """The tokenizer in a model folder; never touches the network or runs the folder's code.

    thinking: `on` or `off` switches it in templates that know `enable_thinking`.

    Raises: ConfigError when there is none, when the folder is refused, when it names no end token,
    or when thinking cannot be switched.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load

    check_texts(folder)
    try:
        ends = load_config(folder).get("eos_token_id")
        inner = load(folder, {"trust_remote_code": False}, eos_token_ids=ends)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ConfigError(f"Cannot load the tokenizer in {folder}: {error}") from error
    ends = frozenset(int(token) for token in inner.eos_token_ids)
    if not ends:
        raise ConfigError(f"The tokenizer in {folder} names no end token, so nothing would stop.")
    return Tokenizer(inner, ends, _chat(inner, thinking))


def _chat(inner: Any, thinking: str) -> ChatTemplate | None:
    """The folder's template; None when there is none, or when mlx-lm has its own code for it."""
    source = inner.chat_template
    if source is None or inner._chat_template is not None:
        if thinking != "auto":
            thinking_switch({}, thinking)
        return None
    sources: Mapping[str, str] = source if isinstance(source, dict) else {"default": source}
    tokens = {name: _plain(token) for name, token in inner.special_tokens_map.items()}
    return ChatTemplate(sources, {**tokens, **thinking_switch(sources, thinking)})


def _plain(token: Any) -> Any:
    return [str(t) for t in token] if isinstance(token, (list, tuple)) else str(token)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""
