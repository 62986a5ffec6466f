"""A served model, asked by the real openai package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import openai
import pytest
import tiny

from localrl.backend import mx
from localrl.embedded import embedded_model_path
from localrl.engines.open import make_policy
from localrl.policy.lora import adapters_off
from localrl.policy.model import load_model
from localrl.serving.model import Names

sys.path.append(str(Path(__file__).parents[1] / "serving"))
from asking import greedy, served, user

GUESS = (
    "I am thinking of a whole number from 37 to 51. Guess it: write one number, and I will say "
    "whether mine is higher or lower. Use as few guesses as you can."
)
QUESTION = "What is 47 times 85?"
TOOL = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Calculate.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def policy():
    """The model that ships with localrl and calls tools, with an adapter that changes it."""
    loaded = load_model(embedded_model_path("turns-0.1m"))
    policy = make_policy(loaded, rank=2, scale=1.0, seed=0, for_cpu=True, dense=True)
    tiny.stir(policy.model, 0, 10.0)
    mx.eval(policy.model.parameters())
    return policy


@pytest.fixture(scope="module")
def texts(policy):
    with adapters_off(policy.model):
        base = greedy(policy, GUESS, 30)
    return {"turns-run": greedy(policy, GUESS, 30), "turns": base}


@pytest.fixture(scope="module")
def client(policy, texts):
    with served(policy, Names("turns", "turns-run"), max_tokens=30) as server:
        yield openai.OpenAI(base_url=server.url, api_key="unused", max_retries=0)


def test_base_and_adapter_by_name_with_streaming_off_and_on(client, texts):
    assert [model.id for model in client.models.list()] == ["turns-run", "turns"]
    assert texts["turns"] != texts["turns-run"]
    for name, text in texts.items():
        whole = client.chat.completions.create(model=name, messages=user(GUESS))
        assert whole.choices[0].message.content == text
        assert whole.model == name
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        chunks = client.chat.completions.create(model=name, messages=user(GUESS), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_logprobs_are_objects_of_the_client(client):
    options = {"logprobs": True, "top_logprobs": 2, "messages": user(GUESS), "model": "turns"}
    choice = client.chat.completions.create(**options).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    assert all(
        token.top_logprobs[0].logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens
    )
    chunks = client.chat.completions.create(stream=True, **options)
    streamed = [token for c in chunks for token in c.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_read(client, stream):
    options = {"model": "turns", "tools": [TOOL], "temperature": 1.0}
    for _ in range(60):
        made = client.chat.completions.create(messages=user(QUESTION), stream=stream, **options)
        deltas = [c.choices[0].delta for c in made] if stream else [made.choices[0].message]
        calls = [call for delta in deltas for call in delta.tool_calls or ()]
        if calls:
            break
    assert json.loads(calls[0].function.arguments) == {"expression": "47*85"}
    said = {"role": "assistant", "content": None, "tool_calls": [calls[0].model_dump()]}
    result = {"role": "tool", "tool_call_id": calls[0].id, "content": "3995"}
    options["temperature"] = 0
    done = client.chat.completions.create(messages=[*user(QUESTION), said, result], **options)
    assert done.choices[0].message.content == "3995"


def test_refusals_are_errors_of_the_client(client):
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4o' here"):
        ask(model="gpt-4o", messages=user("x"))
    with pytest.raises(openai.BadRequestError, match="nothing is loaded"):
        ask(model="turns", messages=user("x"), extra_body={"adapters": "path"})
    with pytest.raises(openai.BadRequestError, match="only text is written"):
        ask(model="turns", messages=user("x"), response_format={"type": "json_object"})
