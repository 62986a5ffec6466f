"""Rendering of chat templates, child side: Jinja as model makers expect it.

Runs in a `processes.worker` child, which has limits. A template is a program from a model's
folder: it may loop forever or grow without bound, so it never runs in the training process. The
environment is that of transformers: templates use the names, filters and tags below.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which a message stores its reasoning; templates read the first, a few the second."""


def render(
    template: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    limit: int,
    date: str | None,
) -> dict[str, Any]:
    """Render conversations to `texts`, one each, of at most `limit` characters.

    The text of one that the template cannot render is None; `refused` says why, by its index.

    variables: further variables for the template: special tokens and switches. date: the day that
    the template sees, as YYYY-MM-DD; None for today.

    Raises: TemplateError if the template is not valid, OverflowError if a text is too long.
    """
    compiled = _compile(template)
    moment = None if date is None else datetime.fromisoformat(date)
    texts: list[str | None] = []
    refused: dict[str, str] = {}
    for index, messages in enumerate(conversations):
        pieces = compiled.generate(
            messages=[_message(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda form: (moment or datetime.now()).strftime(form),
            **variables,
        )
        try:
            texts.append(_join(pieces, limit))
        except jinja2.TemplateError as error:
            refused[str(index)] = str(error)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            refused[str(index)] = f"{type(error).__name__}: {error}"
        if len(texts) == index:
            texts.append(None)
    return {"texts": texts, "refused": refused}


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "dict": _Dictionary(),
        "namespace": _PlainNamespace,
    }
    return environment.from_string(template)


def _join(pieces: Any, limit: int) -> str:
    texts, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > limit:
            raise OverflowError(f"a text of more than {limit} characters")
        texts.append(piece)
    return "".join(texts)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Drop None entries of a message, and copy its reasoning to every key that templates read."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[name] for name in REASONING if name in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialise to JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(Extension):
    """`{% generation %}`, which marks text written by the model; only its contents are kept."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own convention)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dictionary:
    """`dict` for templates, without the attributes of the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        """Same as `dict.fromkeys`."""
        return dict.fromkeys(keys, value)


class _PlainNamespace(Namespace):
    """`namespace` that rejects names beginning with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As in Jinja, so that a template may have an attribute called `self`.
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.TemplateError(f"a namespace cannot contain {name!r}")
