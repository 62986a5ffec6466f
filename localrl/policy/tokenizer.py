"""Conversion of text to token ids and back; the only place that knows a model's prompt format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from localrl.errors import ConfigError, DataError
from localrl.policy.chat import ChatTemplate, Messages, Tools, read_template, settled
from localrl.policy.folder import check_texts
from localrl.policy.prompt_format import (
    EXCHANGE,
    SYSTEM,
    begins_with,
    continued,
    end_of_turn,
    named_ends,
    unknown_token,
)
from localrl.records import Example
from localrl.settings import ModelConfig

UNFINISHED = "\ufffd"
"""Replacement character that tokenizers emit for bytes that do not form a character."""
PLAIN_TEXT = "the sum of 12 and 30 is 42, that of 7 and 8 is 15, and a week has 7 days of 24 hours"
"""Text of the tokens that self-checks use."""
PLAIN_TOKENS = 16
"""Minimum number of them."""
PLAIN_SETTINGS = ModelConfig()
MOST_OPEN = 8
"""Maximum number of tokens buffered to complete a character, which has at most four bytes."""


@dataclass(frozen=True)
class Tokenizer:
    """mlx-lm's tokenizer of a model, restricted to the operations that training needs."""

    inner: Any
    end_ids: frozenset[int]
    """Tokens that end a completion."""
    chat: ChatTemplate | None = None
    """Chat template; None if the folder has none or it is not used: contents are then joined by
    newlines, or rendered by a family's own Python code in mlx-lm."""
    begin_ids: tuple[int, ...] = ()
    """Tokens that a text without a template begins with, such as the beginning of sequence."""
    joins: bool = False
    """True if the contents of messages are joined by newlines."""
    rendered_end: int | None = None
    """Token that the chat template writes after a turn of the model; None if it writes none."""
    unnamed: bool = False
    """True if neither the model's configuration nor the settings name that token."""
    unknown_id: int | None = None
    """Token that stands for characters without a token; None if no file of the model names one."""
    _known: dict[int, str] = field(default_factory=dict, repr=False, compare=False)
    """Texts of single tokens already seen by `pieces`."""

    def render(
        self, messages: Messages, *, tools: Tools | None = None, add_generation_prompt: bool = True
    ) -> str:
        """Render the text given to the model: the chat template, by default up to its turn.

        tools: JSON schemas of the tools that the model may call.

        Raises: DataError or ConfigError, see `ChatTemplate.render`.
        """
        return settled(self.attempt([messages], tools, add_generation_prompt)[0])

    def attempt(
        self,
        conversations: Sequence[Messages],
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> list[str | DataError]:
        """Render many conversations at once; an error stands in the place of one that cannot be.

        Raises: ConfigError, see `ChatTemplate.attempt`.
        """
        if self.chat is not None:
            return self.chat.attempt(
                conversations, tools=tools, add_generation_prompt=add_generation_prompt
            )
        if self.joins and tools:
            return [DataError("Without a chat template the model cannot be shown `tools`.")] * len(
                conversations
            )
        if self.joins:
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

    def prompt_texts(self, examples: Sequence[Example]) -> list[str | DataError]:
        """Render the prompts of many examples at once, with their tools.

        A prompt that ends in the beginning of the model's turn ends there. An error stands in the
        place of a prompt that cannot be rendered.

        Raises: ConfigError, see `ChatTemplate.attempt`.
        """
        groups: dict[tuple[str, bool], list[int]] = {}
        for index, example in enumerate(examples):
            begun = bool(example.begun) and not self.joins
            groups.setdefault((json.dumps(example.tools), begun), []).append(index)
        texts: dict[int, str | DataError] = {}
        for (_, begun), indices in groups.items():
            some = [examples[index] for index in indices]
            rendered = self._begun_texts(some) if begun else self._texts(some)
            texts |= zip(indices, rendered, strict=True)
        return [texts[index] for index in range(len(examples))]

    def _texts(self, examples: Sequence[Example]) -> list[str | DataError]:
        """Render prompts with the same tools."""
        return self.attempt([e.messages for e in examples], examples[0].tools or None)

    def _begun_texts(self, examples: Sequence[Example]) -> list[str | DataError]:
        """The same of prompts that end in the beginning of the model's turn."""
        tools = examples[0].tools or None
        before = self.attempt([example.messages[:-1] for example in examples], tools)
        whole = self.attempt([example.messages for example in examples], tools, False)
        return [
            next(
                (part for part in (one, other) if isinstance(part, DataError)),
                None,
            )
            or continued(str(one), str(other), example.begun)
            for example, one, other in zip(examples, before, whole, strict=True)
        ]

    def attempt_prompts(self, examples: Sequence[Example]) -> list[tuple[int, ...] | DataError]:
        """Encode many prompts at once; an error that names the row stands in the place of one that
        cannot be encoded."""
        found: list[tuple[int, ...] | DataError] = []
        for example, text in zip(examples, self.prompt_texts(examples), strict=True):
            try:
                found.append(self.encode_prompt_text(settled(text)))
            except DataError as error:
                name = example.place or example.id
                found.append(DataError(f"{name}: {error}") if name else error)
        return found

    def encode_prompts(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """Encode the prompts of many examples at once, which is faster than one by one.

        Raises: DataError or ConfigError, see `ChatTemplate.render`.
        """
        return [settled(ids) for ids in self.attempt_prompts(examples)]

    def encode(self, messages: Messages, *, tools: Tools | None = None) -> tuple[int, ...]:
        """Encode a prompt to token ids. Special tokens come only from the template."""
        return self.encode_prompts([Example("", tuple(messages), tools=tuple(tools or ()))])[0]

    def encode_prompt_text(self, text: str) -> tuple[int, ...]:
        """Encode a whole prompt as rendered.

        Without a template it begins as the model's texts do, see `begin_ids`, as in transformers.
        """
        ids, begin = self.encode_text(text), self.begin_ids
        return ids if ids[: len(begin)] == begin else (*begin, *ids)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Encode a rendered text without adding special tokens.

        Raises: DataError if it is not valid Unicode.
        """
        try:
            # Not verbose: transformers would tell of texts above a length that it has from a file.
            return tuple(self.inner.encode(text, add_special_tokens=False, verbose=False))
        except (TypeError, UnicodeEncodeError):
            raise DataError(
                f"A text holds half of a character, which no tokenizer can read: {text!a:.80}."
            ) from None

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
        token = self.unknown_id
        if token is None or token not in self.encode(messages):
            return ""
        characters = dict.fromkeys("".join(map(_content, messages)))
        return "".join(c for c in characters if token in self.encode_text(c))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode what the model wrote: every token but those that end a completion."""
        return self._plain([token for token in token_ids if token not in self.end_ids])

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


def load_tokenizer(folder: Path, wish: ModelConfig = PLAIN_SETTINGS) -> Tokenizer:
    """Load the tokenizer in a model folder, without the network and without the folder's code.

    wish: how prompts are made (thinking, chat_template, template_date) and more end tokens.

    Raises: ConfigError if there is none, if the folder is refused, if it names no end token, or if
    something in `wish` cannot be had.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load

    check_texts(folder)
    try:
        ends = load_config(folder).get("eos_token_id")
        inner = load(folder, {"trust_remote_code": False}, eos_token_ids=ends)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ConfigError(f"Cannot load the tokenizer in {folder}: {error}") from error
    chat = read_template(inner, wish)
    joins = wish.chat_template == "off" or not inner.has_chat_template
    unknown = unknown_token(inner)
    named = {*map(int, inner.eos_token_ids), *named_ends(inner, wish.end_tokens, unknown)}
    begin = begins_with(inner) if joins else ()
    tokenizer = Tokenizer(inner, frozenset(named), chat, begin, joins, unknown_id=unknown)
    end = _rendered_end(tokenizer)
    ends = frozenset(named if end is None else {*named, end})
    if not ends:
        raise ConfigError(
            f"The tokenizer in {folder} names no end token, so sampling would not stop. Name it "
            "with model.end_tokens."
        )
    inner.eos_token_ids = ends  # for mlx-lm's own generation
    return replace(tokenizer, end_ids=ends, rendered_end=end, unnamed=end not in {None, *named})


def rendered_turns(tokenizer: Tokenizer) -> tuple[str, str]:
    """Render a conversation that ends with the model's turn, and one that goes on with a question.

    A text is empty if the template refuses it. If it refuses both, they begin with the system.

    Raises: ConfigError, see `ChatTemplate.attempt`.
    """
    last: Messages = EXCHANGE
    middle: Messages = (*EXCHANGE, EXCHANGE[0])
    for before in ((), (SYSTEM,)):
        found = tokenizer.attempt(
            [(*before, *last), (*before, *middle)], add_generation_prompt=False
        )
        one, other = ("" if isinstance(text, DataError) else text for text in found)
        if one or other:
            return one, other
    return "", ""


def _rendered_end(tokenizer: Tokenizer) -> int | None:
    """Return the token that the chat template writes after a turn of the model, if it does.

    Raises: ConfigError, see `ChatTemplate.render`.
    """
    if tokenizer.chat is None:
        return None
    last, middle = rendered_turns(tokenizer)
    return end_of_turn(last, middle, tokenizer.inner, tokenizer.end_ids)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""
