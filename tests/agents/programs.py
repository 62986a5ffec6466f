"""Agents that the tests run: each is a function that the worker calls by this file's path."""

import asyncio
import json
import os
import time
import urllib.error
import urllib.request
from contextlib import suppress

MANNERS = (
    *("plain", "raises", "hangs", "chatty", "wordy", "odd", "silent", "exits"),
    *("stuck", "goes on"),
)
"""Ways to behave; an example's answer names one."""


def ask(base_url, api_key, messages, **options):
    """The answer to a chat request, as text."""
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps({"model": "gpt", "messages": messages, **options}).encode(),
        {"Authorization": f"Bearer {api_key}"},
    )
    with urllib.request.urlopen(request) as answer:
        return answer.read().decode()


def say(base_url, api_key, messages, **options):
    """The model's next message."""
    return json.loads(ask(base_url, api_key, messages, **options))["choices"][0]["message"]


def guess(example, base_url, api_key):
    """What the environment of `guessing` does, by the environment itself."""
    from localrl.tasks.guessing import Guess

    game, messages = Guess(), list(example["prompt"])
    game.reset(answer=example["answer"], low=example["low"], high=example["high"])
    for _ in range(4):
        said = say(base_url, api_key, messages)
        reply = game.step(said["content"])
        if reply is None:
            break
        messages += [said, {"role": "user", "content": reply}]
    return game.get_reward()


TOOL = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Calculate the value of an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


async def calculate(example, base_url, api_key):
    """Answers with the help of a tool of its own; returns the conversation."""
    from localrl.tasks.calculator_tool import value_of

    await asyncio.sleep(0)
    messages = list(example["prompt"])
    for _ in range(2):
        said = say(base_url, api_key, messages, tools=[TOOL])
        messages.append(said)
        for call in said.get("tool_calls", ()):
            expression = json.loads(call["function"]["arguments"])["expression"]
            content = str(value_of(expression))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
        if not said.get("tool_calls"):
            break
    return messages[len(example["prompt"]) :]


def behave(example, base_url, api_key):
    """Behaves as the example's answer says, after a first call."""
    manner = example["answer"]
    if manner == "silent":
        return 0.25
    said = say(base_url, api_key, example["prompt"], max_tokens=5)
    messages = [*example["prompt"], said, {"role": "user", "content": "lower"}]
    if manner == "raises":
        raise ValueError("on purpose")
    if manner == "hangs":
        time.sleep(900)
    if manner == "exits":
        raise SystemExit
    if manner in ("stuck", "goes on"):
        with suppress(urllib.error.HTTPError):
            say(base_url, api_key, [*messages[:-1], {"role": "user", "content": "lower " * 40}])
        if manner == "stuck":
            time.sleep(900)
        say(base_url, api_key, example["prompt"], max_tokens=1)
    while manner in ("chatty", "wordy"):
        options = {} if manner == "wordy" else {"max_tokens": 1}
        messages.append(say(base_url, api_key, messages, **options))
        messages.append({"role": "user", "content": "lower " * (20 if manner == "wordy" else 1)})
    return {"an": "object"} if manner == "odd" else 1


def unnamed(example, /):
    """Takes its argument by place alone."""


def kills(**kwargs):
    """A reward that ends its process."""
    os._exit(1)


def two_rooms(example, base_url, api_key):
    """Holds two conversations, the second of which begins otherwise, and asks the first again."""
    first = list(example["prompt"])
    said = say(base_url, api_key, first)
    other = [{"role": "user", "content": "What is 12 times 34?"}]
    other_said = say(base_url, api_key, other)
    say(base_url, api_key, [*first, said, {"role": "user", "content": "higher"}])
    say(base_url, api_key, [*first, said, {"role": "user", "content": "lower"}])
    return f"{example['answer']}: {said['content']} / {other_said['content']}"


def streams(example, base_url, api_key):
    """Reads a streamed answer with log-probabilities; returns them summed, and the text."""
    text = ask(base_url, api_key, example["prompt"], stream=True, logprobs=True, stop=["4"])
    lines = [line for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    said = "".join(choice["delta"].get("content") or "" for choice in choices)
    tokens = [token for c in choices for token in (c["logprobs"] or {}).get("content", ())]
    total = sum(token["logprob"] for token in tokens)
    return json.dumps([said, total, "".join(token["token"] for token in tokens)])


def prowls(example, base_url, api_key):
    """Asks for what it must not have; returns the statuses that it got."""
    root, _, own = base_url.removesuffix("/v1").rpartition("/")
    body = {"messages": example["prompt"]}
    tries = (
        (base_url, "wrong", body),
        (base_url, "", body),
        (f"{root}/{int(own) + 1000}/v1", api_key, body),
        (base_url, api_key, {**body, "adapters": "/tmp/elsewhere"}),
        (base_url, api_key, {**body, "n": 2}),
        (base_url, api_key, {**body, "max_tokens": 0}),
        (base_url, api_key, {"messages": [{"role": "user", "content": "long " * 600}]}),
    )
    statuses = []
    for url, key, what in tries:
        try:
            ask(url, key, what.pop("messages", None) or example["prompt"], **what)
            statuses.append("200")
        except urllib.error.HTTPError as error:
            statuses.append(str(error.code))
    said = say(base_url, api_key, example["prompt"])
    return f"{' '.join(statuses)} {said['content']}"
