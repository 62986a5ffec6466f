"""The arguments of reward functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from localrl.records import Example, Group

Render = Callable[[Sequence[int]], str]


def call_arguments(
    groups: Sequence[Group], *, ids: bool = True, render: Render | None = None
) -> dict[str, list[Any]]:
    """The keyword arguments of a reward function, each a list with one entry per leaf.

    `prompts` are lists of chat messages and `completions` lists with one assistant message, or
    both are texts if the prompt was given as text; a turn that the prompt begins is part of the
    completion, as in TRL; `completion_ids`, with `ids`, are lists of tokens; then `answer` and the
    examples' columns, None where an example lacks one. A completion that talked to an environment
    is its whole message list; `environments` names conversations. `rendered_prompts`, with
    `render`, are the prompts as the model saw them, up to its turn.
    """
    leaves = [(group, index) for group in groups for index in range(len(group.leaves))]
    columns = dict.fromkeys(name for group in groups for name in group.example.columns)
    given = {name: [group.example.columns.get(name) for group, _ in leaves] for name in columns}
    given["answer"] = [_gold(group.example) for group, _ in leaves]
    given["prompts"] = [_prompt(group, index) for group, index in leaves]
    given["completions"] = [_completion(group, index) for group, index in leaves]
    if ids:
        given["completion_ids"] = [_token_ids(group, index) for group, index in leaves]
    else:
        given.pop("completion_ids", None)
    if render is not None:
        shown = [_up_to_the_turn(render(group.prompt_ids), group.example) for group in groups]
        given["rendered_prompts"] = [
            text for text, group in zip(shown, groups, strict=True) for _ in group.leaves
        ]
    conversations = [group.leaves[index].conversation for group, index in leaves]
    if any(number is not None for number in conversations):
        given["environments"] = conversations
    return given


def _prompt(group: Group, index: int) -> Any:
    example = group.example
    if example.as_text and not group.leaves[index].messages:
        return example.messages[-1]["content"]
    asked = example.messages[:-1] if example.begun else example.messages
    return [dict(message) for message in asked]


def _completion(group: Group, index: int) -> Any:
    leaf = group.leaves[index]
    if leaf.messages:
        return [dict(message) for message in leaf.messages]
    text = group.example.begun + leaf.text
    return text if group.example.as_text else [{"role": "assistant", "content": text}]


def _up_to_the_turn(rendered: str, example: Example) -> str:
    begun = example.begun.strip()
    return rendered.rstrip().removesuffix(begun) if begun else rendered


def _token_ids(group: Group, index: int) -> list[int]:
    nodes = group.nodes_of(group.leaves[index])
    return [token for node in nodes for token in group.nodes[node].token_ids.tolist()]


def _gold(example: Example) -> Any:
    return example.columns.get("answer") if example.answer is None else example.answer
