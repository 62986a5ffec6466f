"""The served model as mlx-lm's server wants it: loaded before, with and without its adapter."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.server import ModelProvider
from mlx_lm.tokenizer_utils import TokenizerWrapper

from localrl.backend import mx
from localrl.errors import DataError
from localrl.policy.lora import adapters_off
from localrl.policy.model import Policy
from localrl.policy.tokenizer import Tokenizer
from localrl.serving.requests import ServedFacts


@dataclass(frozen=True)
class Names:
    """Names under which a model is asked."""

    base: str
    adapter: str | None
    """Name of the model with its adapter; None if there is none."""

    @property
    def all(self) -> tuple[str, ...]:
        """The names, the default one first."""
        return (self.base,) if self.adapter is None else (self.adapter, self.base)


@dataclass(frozen=True)
class ServeLimits:
    """Sizes and defaults of a server."""

    max_tokens: int
    """Longest answer if a request names no limit, in tokens."""
    temperature: float
    """Temperature if a request names none."""
    rows: int
    """Number of answers decoded at once."""
    cache_bytes: int | None
    """Most bytes of keys and values kept for conversations that go on; None for no limit."""


class ServedModel(ModelProvider):
    """A loaded policy under its names; it has nothing to load from."""

    def __init__(self, policy: Policy, names: Names, limits: ServeLimits) -> None:
        super().__init__(_arguments(limits))
        self.names, self._policy = names, policy
        self._off = ExitStack()
        self._device = mx.default_device()
        self.model = policy.model
        _compute_all(policy.model)
        arguments = getattr(policy.model, "args", None)
        context = getattr(arguments, "max_position_embeddings", None)
        self.tokenizer = ServedTokenizer(policy.tokenizer, context)
        self.facts = ServedFacts(names.all, len(self.tokenizer), context)
        self.is_batchable = all(hasattr(c, "merge") for c in make_prompt_cache(policy.model))

    def load_default(self) -> None:
        """Let the calling thread, which will generate, compute on the device of this one."""
        mx.set_default_device(self._device)

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """Switch the adapter on or off. Called by the generating thread, between two batches.

        Raises: ValueError for anything but one of the names.
        """
        if model_path not in self.names.all or adapter_path is not None:
            raise ValueError(f"there is no model {model_path!r} here")
        if self.model_key != (model_path, None, None):
            self._off.close()
            if model_path != self.names.adapter:
                self._off.enter_context(adapters_off(self._policy.model))
            self.model_key = (model_path, None, None)
        return self.model, self.tokenizer

    def _load(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("nothing is loaded for a request")


class ServedTokenizer(TokenizerWrapper):
    """mlx-lm's tokenizer of a model, with prompts rendered as in training: in the child process
    with limits, since a template is a program from the model's folder."""

    has_chat_template = True

    def __init__(self, tokenizer: Tokenizer, context: int | None) -> None:
        self.__dict__.update(vars(tokenizer.inner))
        self._rendering, self._context = tokenizer, context

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> Any:
        """Return the token ids of a conversation, or its text.

        variables: switches of the template, besides those of training.

        Raises: DataError for a conversation beyond the model's context, for characters that it has
        no token for, or for variables without a template; and as `Tokenizer.render` does.
        """
        tokenizer = self._rendering
        if variables:
            if tokenizer.chat is None:
                raise DataError("chat_template_kwargs: this model has no chat template")
            known = {**tokenizer.chat.variables, **variables}
            chat = replace(tokenizer.chat, variables=known, _texts={}, _size=0)
            tokenizer = replace(tokenizer, chat=chat)
        text = tokenizer.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        if not tokenize:
            return text
        ids = list(tokenizer.encode_text(text))
        if self._context is not None and len(ids) >= self._context:
            raise DataError(
                f"the conversation has {len(ids)} tokens, and the model's context {self._context}"
            )
        if tokenizer.unknown_id in ids and (unknown := tokenizer.unknown(messages)):
            raise DataError(f"the model has no token for {unknown!r}")
        return ids

    def text_of(self, token: int) -> str:
        """Return the text of a token."""
        return self._rendering.pieces([token])[0]


def _compute_all(model: Any) -> None:
    """Compute every array of the model, also those that are no parameters: what this thread has
    left to compute, the generating one could not."""
    arrays = [v for module in model.modules() for v in module.values() if isinstance(v, mx.array)]
    mx.eval(arrays, mx.random.state)


def _arguments(limits: ServeLimits) -> Namespace:
    """Return the options of `mlx_lm.server`: its defaults, but for what is given here."""
    return Namespace(
        model=None,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=0,
        trust_remote_code=False,
        chat_template="",
        use_default_chat_template=False,
        chat_template_args={},
        allowed_origins=[],
        temp=limits.temperature,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        max_tokens=limits.max_tokens,
        decode_concurrency=limits.rows,
        prompt_concurrency=min(8, limits.rows),
        prefill_step_size=2048,
        prompt_cache_size=10,
        prompt_cache_bytes=limits.cache_bytes,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=0,
        pipeline=False,
    )
