"""Conversion of text to token ids and back; the only place that knows a model's prompt format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localrl.errors import ConfigError
from localrl.policy.chat import ChatTemplate, Messages, Tools, thinking_switch
from localrl.policy.folder import check_texts

UNFINISHED = "\ufffd"
"""Replacement character that tokenizers emit for bytes that do not form a character."""
PLAIN_TEXT = "the sum of 12 and 30 is 42, that of 7 and 8 is 15, and a week has 7 days of 24 hours"
"""Text of the tokens that self-checks use."""
PLAIN_TOKENS = 16
"""Minimum number of them."""
MOST_OPEN = 8
"""Maximum number of tokens buffered to complete a character, which has at most four bytes."""


@dataclass(frozen=True)
class Tokenizer:
    """mlx-lm's tokenizer of a model, restricted to the operations that training needs."""

    inner: Any
    end_ids: frozenset[int]
    """Tokens that end a completion."""
    chat: ChatTemplate | None = None
    """Chat template; None if the folder has none: contents are then joined by newlines, or rendered
    by a family's own Python code in mlx-lm."""
    _known: dict[int, str] = field(default_factory=dict, repr=False, compare=False)
    """Texts of single tokens already seen by `pieces`."""

    def render(
        self, messages: Messages, *, tools: Tools | None = None, add_generation_prompt: bool = True
    ) -> str:
        """Render the text given to the model: the chat template, by default up to its turn.

        tools: JSON schemas of the tools that the model may call.

        Raises: DataError or ConfigError, see `ChatTemplate.render`.
        """
        return self.render_all([messages], tools, add_generation_prompt)[0]

    def render_all(
        self,
        conversations: Sequence[Messages],
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> list[str]:
        """Render many conversations at once, which is faster than `render` for each."""
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
        """Encode a prompt to token ids. Special tokens come only from the template."""
        return self.encode_text(self.render(messages, tools=tools))

    def encode_all(self, conversations: Sequence[Messages]) -> list[tuple[int, ...]]:
        """Encode many conversations at once, which is faster than `encode` for each."""
        return [self.encode_text(text) for text in self.render_all(conversations)]

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Encode a rendered text without adding special tokens."""
        return tuple(self.inner.encode(text, add_special_tokens=False))

    def plain_tokens(self) -> tuple[int, ...]:
        """Encode a plain sentence as the model begins a text: ordinary tokens for self-checks.

        Tokenizers that know too little of it are given small token ids after the rest: every
        vocabulary has them.
        """
        special = set(self.inner.all_special_ids)
        begin, *rest = self.inner.encode(PLAIN_TEXT) or [-1]
        known = [begin] * (begin == self.inner.bos_token_id or begin not in special | {-1})
        known += [token for token in rest if token not in special]
        missing = max(0, PLAIN_TOKENS - len(known))
        return (*known, *range(1, missing + 1))

    def unknown(self, messages: Messages) -> str:
        """Return the characters of the messages that the model has no token for."""
        token = self.inner.unk_token_id
        if token is None or token not in self.encode(messages):
            return ""
        characters = dict.fromkeys("".join(map(_content, messages)))
        return "".join(c for c in characters if token in self.encode_text(c))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode a completion, without special tokens."""
        return self.inner.decode(list(token_ids), skip_special_tokens=True)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text that each token adds, special tokens by name; for people only.

        If several tokens form one character, the last one gets the text and the others get none.
        Bytes that never form a character become U+FFFD, as in the whole text.
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
            # Doubled, because some tokenizers strip the leading space of a text.
            once, twice = self._plain([token]), self._plain([token, token])
            self._known[token] = twice[len(once) :] if twice.startswith(once) else once
        return self._known[token]

    def _plain(self, token_ids: list[int]) -> str:
        return self.inner.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def load_tokenizer(folder: Path, *, thinking: str = "auto") -> Tokenizer:
    """Load the tokenizer in a model folder, without the network and without the folder's code.

    thinking: `on` or `off` sets it in templates that support `enable_thinking`.

    Raises: ConfigError if there is none, if the folder is refused, if it names no end token, or if
    thinking cannot be switched.
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
        raise ConfigError(
            f"The tokenizer in {folder} names no end token, so sampling would not stop."
        )
    return Tokenizer(inner, ends, _chat(inner, thinking))


def _chat(inner: Any, thinking: str) -> ChatTemplate | None:
    """Return the folder's template; None if there is none or mlx-lm has its own code for it."""
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
