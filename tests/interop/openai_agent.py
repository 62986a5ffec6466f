"""Agents written with the real openai package, as its documentation writes them."""

from __future__ import annotations

import json

import openai

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


CLIENT = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none")
"""Shared by all agents of the process: making a client takes ten times as long as a call."""


def guess(example, base_url, api_key):
    """Plays number guessing; the model's own message goes back as the object that it is."""
    return _play(example, CLIENT.with_options(base_url=base_url, api_key=api_key), _whole)


def guess_streaming(example, base_url, api_key):
    """Plays the same with streamed answers."""
    return _play(example, openai.OpenAI(base_url=base_url, api_key=api_key), _streamed)


async def guess_async(example, base_url, api_key):
    """Plays the same with the asynchronous client."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key)
    messages = list(example["prompt"])
    for _ in range(4):
        made = await client.chat.completions.create(model="gpt-4o", messages=messages)
        reply = _heard(example, made.choices[0].message.content)
        if reply is None:
            return 1.0
        messages += [made.choices[0].message, {"role": "user", "content": reply}]
    return 0.0


def calculate(example, base_url, api_key):
    """Answers a product with a tool; returns the last text."""
    client = openai.OpenAI(base_url=base_url, api_key=api_key)
    messages = list(example["prompt"])
    for _ in range(2):
        made = client.chat.completions.create(model="gpt-4o", messages=messages, tools=[TOOL])
        said = made.choices[0].message
        if not said.tool_calls:
            break
        messages.append(said)
        for call in said.tool_calls:
            one, other = json.loads(call.function.arguments)["expression"].split("*")
            content = str(int(one) * int(other))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return said.content or ""


def refused(example, base_url, api_key):
    """Asks without the run's token; returns the client's error."""
    client = openai.OpenAI(base_url=base_url, api_key="another", max_retries=0)
    try:
        client.chat.completions.create(model="gpt-4o", messages=example["prompt"])
    except openai.AuthenticationError as error:
        return f"refused: {error}"
    return "answered"


def _play(example, client, ask):
    messages = list(example["prompt"])
    for _ in range(4):
        try:
            said = ask(client, messages)
        except openai.BadRequestError:  # no token is left for another turn
            return 0.0
        content = said["content"] if isinstance(said, dict) else said.content
        reply = _heard(example, content)
        if reply is None:
            return 1.0
        messages += [said, {"role": "user", "content": reply}]
    return 0.0


def _whole(client, messages):
    made = client.chat.completions.create(model="gpt-4o", messages=messages)
    return made.choices[0].message


def _streamed(client, messages):
    chunks = client.chat.completions.create(model="gpt-4o", messages=messages, stream=True)
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    return {"role": "assistant", "content": "".join(deltas)}


def _heard(example, text):
    """What the built-in environment answers: None once the number is found."""
    from localrl.tasks.guessing import Guess

    game = Guess()
    game.reset(answer=example["answer"], low=example["low"], high=example["high"])
    return game.step(text)
