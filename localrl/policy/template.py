"""Rendering chat templates, the child's side: Jinja in the way model makers expect it.

Runs in a `processes.worker` child, which has the limits. A template is a program out of a model's
folder: it may loop for ever or grow without bound, so it never runs in the process that trains.
The environment is that of transformers: the names, filters and tags below are what templates use.
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
"""Names under which a message holds its reasoning; templates read the first, a few the second."""


def render(
    template: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    limit: int,
) -> dict[str, Any]:
    """`texts`, one for each conversation, of at most `limit` characters.

    When the template cannot write one, `texts` ends before it and `refused` says why.

    variables: what the template sees besides: special tokens and switches.

    Raises: TemplateError when the template is not valid, OverflowError when a text is too long.
    """
    compiled = _compile(template)
    texts: list[str] = []
    for messages in conversations:
        pieces = compiled.generate(
            messages=[_message(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        try:
            texts.append(_join(pieces, limit))
        except jinja2.TemplateError as error:
            return {"texts": texts, "refused": str(error)}
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            return {"texts": texts, "refused": f"{type(error).__name__}: {error}"}
    return {"texts": texts}


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
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
    """The message without what is None, its reasoning under every name that templates look for."""
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
    """JSON as it is, where Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(Extension):
    """`{% generation %}`, which marks what the model wrote: here it is only its contents."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way to name them)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dictionary:
    """`dict` without the attributes of the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        """As of `dict`."""
        return dict.fromkeys(keys, value)


class _PlainNamespace(Namespace):
    """`namespace` that holds no names of Python's inner parts."""

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
        raise jinja2.TemplateError(f"a namespace cannot hold {name!r}")
