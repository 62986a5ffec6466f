"""A served model: what clients get, and what nobody gets it to do."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException

import numpy as np
import pytest
import tiny
from asking import chat, fetch, greedy, post, served, stream, user
from waiting import DEADLINE_S

from localrl.backend import mx
from localrl.embedded import embedded_model_path
from localrl.engines.open import make_policy
from localrl.errors import ConfigError, LocalRLError
from localrl.policy.lora import adapters_off
from localrl.policy.model import load_model
from localrl.policy.tokenizer import load_tokenizer
from localrl.serving.model import Names, ServedModel, ServedTokenizer, ServeLimits
from localrl.serving.server import ChatServer, serve
from localrl.settings import ModelConfig

NAMES = Names("tiny", "tiny-run")
VOCABULARY = len(tiny.SPECIAL) + len(tiny.CHARACTERS)
"""Every token of the model has a text."""


@pytest.fixture(scope="module")
def served_policy(tmp_path_factory):
    """A policy of its own: the server switches its adapter."""
    folder = tmp_path_factory.mktemp("models") / "served"
    policy = tiny.make_tiny_policy(folder, trained=False, vocab_size=VOCABULARY)
    tiny.stir(policy.model, 0, 0.3)
    mx.eval(policy.model.parameters())
    return policy


@pytest.fixture(scope="module")
def answers(served_policy):
    """What the model says by itself, by name and question, before anything serves it."""
    found = {}
    for text in ("hello", "one", "two", "3+4"):
        found["tiny-run", text] = greedy(served_policy, text, 12)
        with adapters_off(served_policy.model):
            found["tiny", text] = greedy(served_policy, text, 12)
    return found


@pytest.fixture(scope="module")
def server(served_policy, answers):
    with served(served_policy, NAMES) as server:
        yield server


def test_base_and_adapter_answer_by_name_also_when_they_are_asked_at_once(server, answers):
    assert len(set(answers.values())) == len(answers)
    assert chat(server)["message"]["content"] == answers["tiny-run", "hello"]
    questions = [*answers] * 4
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda asked: chat(server, asked[1], model=asked[0]), questions))
    assert [choice["message"]["content"] for choice in said] == [answers[q] for q in questions]
    assert {choice["finish_reason"] for choice in said} == {"length"}


def test_the_models_are_listed_and_nothing_of_the_hub_s_cache(server):
    status, body = fetch(f"{server.url}/models")
    assert status == 200
    assert [entry["id"] for entry in json.loads(body)["data"]] == ["tiny-run", "tiny"]
    assert fetch(f"{server.url.removesuffix('/v1')}/health") == (200, '{"status": "ok"}')
    for path in ("/models/tiny", "/models/user/other", "/completions", "/files"):
        assert fetch(server.url + path)[0] == 404


def test_a_streamed_answer_is_the_same(server, answers):
    chunks = stream(server, "one", stream_options={"include_usage": True})
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == answers["tiny-run", "one"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert all("usage" not in chunk for chunk in stream(server, "one", stream_options={}))


def test_log_probabilities_are_those_of_the_sampled_tokens(server, served_policy):
    """Not of the likeliest ones; and a stream has the same form."""
    options = {"logprobs": True, "top_logprobs": 3, "temperature": 3.0, "seed": 1, "model": "tiny"}
    content = chat(server, "3+4", **options)["logprobs"]["content"]
    text = "".join(entry["token"] for entry in content)
    tokenizer = served_policy.tokenizer
    prompt = tokenizer.encode(user("3+4"))
    ids = tokenizer.encode_text(text)
    with adapters_off(served_policy.model):
        logits = served_policy.model(mx.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
        logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    wanted = [logprobs[i, token] for i, token in enumerate(ids)]
    assert np.allclose([entry["logprob"] for entry in content], wanted, atol=1e-4)
    best = np.sort(logprobs, axis=-1)[:, -3:]
    tops = [sorted(top["logprob"] for top in entry["top_logprobs"]) for entry in content]
    assert np.allclose(tops, best, atol=1e-4)
    assert any(entry["logprob"] < min(top) for entry, top in zip(content, tops, strict=True))
    assert content[0]["bytes"] == list(content[0]["token"].encode())
    chunks = [chunk["choices"][0] for chunk in stream(server, "3+4", **options)]
    assert [entry for c in chunks for entry in c["logprobs"]["content"]] == content
    assert "logprobs" not in chat(server)


def test_temperature_and_length_are_those_of_training_unless_a_request_names_them(server):
    assert chat(server) == chat(server, temperature=0)
    assert len({chat(server, temperature=2.0)["message"]["content"] for _ in range(3)}) > 1
    one, longer = (chat(server, max_tokens=n)["message"]["content"] for n in (1, 15))
    assert longer.startswith(one)
    assert len(longer) == 15
    stopped = chat(server, stop=[longer[2]])
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["content"] == longer[: longer.index(longer[2])]


SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def test_what_a_model_computes_late_can_be_used_by_the_generating_thread(tmp_path):
    """Arrays that are no parameters, such as scaled frequencies, may still be lazy."""
    policy = tiny.make_tiny_policy(tmp_path / "llama", model_type="llama", rope_scaling=SCALED)
    for layer in policy.model.layers:
        rope = layer.self_attn.rope
        rope._freqs = rope._freqs * 1.0
    with served(policy, Names("llama", None)) as server:
        said = chat(server)["message"]["content"]
    assert said == greedy(policy, "hello", 12)


TOOL = {
    "type": "function",
    "function": {
        "name": "calculate",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def calling():
    """The model that ships with localrl and calls tools now and then."""
    loaded = load_model(embedded_model_path("turns-0.1m"))
    policy = make_policy(loaded, rank=2, scale=1.0, seed=0, for_cpu=True, dense=True)
    with served(policy, Names("turns", None), temperature=1.0, max_tokens=40) as server:
        yield server


def test_tools_are_called_and_their_results_read(calling):
    for _ in range(40):
        choice = chat(calling, "What is 47 times 85?", tools=[TOOL])
        if choice["finish_reason"] == "tool_calls" and "47*85" in str(choice["message"]):
            break
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "calculate"
    assert json.loads(call["function"]["arguments"])["expression"] == "47*85"
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "3995"}
    messages = [*user("What is 47 times 85?"), said, result]
    status, body = post(calling, {"messages": messages, "tools": [TOOL], "temperature": 0})
    assert status == 200
    assert json.loads(body)["choices"][0]["message"]["content"] == "3995"


def test_tool_calls_are_streamed_whole(calling):
    for _ in range(40):
        chunks = stream(calling, "What is 47 times 85?", tools=[TOOL])
        if chunks[-1]["choices"][0]["finish_reason"] == "tool_calls":
            break
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    [call] = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert call["index"] == 0
    assert json.loads(call["function"]["arguments"])["expression"]


def test_characters_that_the_model_lacks_are_told(calling):
    status, said = post(calling, {"messages": user("\u00c9")})
    assert status == 404
    assert "no token for '\u00c9'" in json.loads(said)["error"]


def test_prompts_are_rendered_as_in_training_unless_a_request_switches_the_template(tmp_path):
    switch = "{{ {true: '?', false: '-'}.get(enable_thinking, '+') }}"
    template = tiny.TEMPLATE + switch
    for thinking, plain in (("auto", "+"), ("off", "-")):
        folder = tiny.make_folder(tmp_path / thinking, template=template)
        tokenizer = load_tokenizer(folder, ModelConfig(thinking=thinking))
        served = ServedTokenizer(tokenizer, None)
        options = {"add_generation_prompt": True, "tools": None}
        ids = served.apply_chat_template(user("hi"), **options)
        assert tuple(ids) == tokenizer.encode(user("hi"))
        for variables, mark in (({}, plain), ({"enable_thinking": True}, "?")):
            text = served.apply_chat_template(user("hi"), tokenize=False, **variables, **options)
            assert text == f"<user>hi<assistant>{mark}"


@pytest.fixture
def loads_nothing(monkeypatch):
    """Fail whatever in mlx-lm's server loads a model or opens an address."""

    def refuse(*arguments, **options):
        raise AssertionError("something was loaded")

    for name in ("load", "sharded_load", "urlopen", "scan_cache_dir"):
        monkeypatch.setattr(f"mlx_lm.server.{name}", refuse)


@pytest.mark.usefixtures("loads_nothing")
def test_nothing_that_a_request_names_is_loaded(server, tmp_path, answers):
    tiny.make_folder(tmp_path / "other")
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    for body, status in (
        ({"model": str(tmp_path / "other")}, 404),
        ({"model": "mlx-community/Qwen3-0.6B-4bit"}, 404),
        ({"model": "default_model"}, 404),
        ({"model": ""}, 404),
        ({"model": ["tiny"]}, 404),
        ({"adapters": str(tmp_path)}, 400),
        ({"draft_model": str(tmp_path / "other")}, 400),
        ({"draft_model": "default_model"}, 400),
        ({"role_mapping": {"user": "x"}}, 400),
        ({"messages": [{"role": "user", "content": [image]}]}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "text", "image": "file:///"}]}]}, 400),
    ):
        got, said = post(server, {"messages": user("hello"), **body})
        assert (got, "error" in json.loads(said)) == (status, True), said
    assert chat(server)["message"]["content"] == answers["tiny-run", "hello"]


BAD = {
    "no JSON": b"{",
    "no UTF-8": b'{"messages": "\xff"}',
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "NaN": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "no messages": {},
    "empty messages": {"messages": []},
    "messages as text": {"messages": "hello"},
    "a message as text": {"messages": ["hello"]},
    "no role": {"messages": [{"content": "hello"}]},
    "content a number": {"messages": [{"role": "user", "content": 1}]},
    "several answers": {"n": 2},
    "a format": {"response_format": {"type": "json_object"}},
    "a forced tool": {"tool_choice": "required", "tools": [TOOL]},
    "old functions": {"functions": [TOOL["function"]]},
    "tools as names": {"tools": ["calculate"]},
    "empty stop": {"stop": [""]},
    "stop a number": {"stop": 3},
    "top_k of all tokens": {"top_k": VOCABULARY},
    "a token beyond": {"logit_bias": {str(VOCABULARY): 1}},
    "a token below": {"logit_bias": {"-1": 1}},
    "tokens as a list": {"logit_bias": [1]},
    "huge number": {"repetition_context_size": 10**30},
    "huge length": {"max_tokens": 10**30},
    "more than the context": {"max_completion_tokens": 4097},
    "a conversation beyond the context": {"messages": user("x" * 4096)},
    "no length": {"max_tokens": 0},
    "cold": {"temperature": -1},
    "warm as text": {"temperature": "hot"},
    "too many": {"top_logprobs": 12, "logprobs": True},
    "stream as text": {"stream": "yes"},
    "options as text": {"stream_options": "usage", "stream": True},
    "template settings as text": {"chat_template_kwargs": "x"},
    "template settings that clash": {"chat_template_kwargs": {"messages": []}},
}


def test_malformed_requests_get_a_reason_and_the_server_goes_on(server, answers):
    for kind, bad in BAD.items():
        body = {"messages": user("hello"), **bad} if isinstance(bad, dict) and bad else bad
        status, said = post(server, body)
        assert 400 <= status < 500, kind
        assert json.loads(said)["error"], kind
    assert chat(server)["message"]["content"] == answers["tiny-run", "hello"]


def test_null_is_the_default_and_harmless_fields_are_taken(server):
    plain = chat(server)
    nothing = dict.fromkeys(("temperature", "max_tokens", "stop", "tools", "adapters", "seed"))
    assert chat(server, **nothing) == plain
    assert chat(server, n=1, user="me", response_format={"type": "text"}) == plain
    assert chat(server, tool_choice="none", tools=[TOOL]) == plain
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert json.loads(post(server, {"messages": parts})[1])["choices"] == [plain]


def test_pages_of_other_sites_and_other_names_are_not_answered(server):
    body = {"messages": user("hello")}
    for host in ("evil.example", "127.0.0.1.evil.example", ""):
        assert post(server, body, Host=host)[0] == 421
        assert fetch(f"{server.url}/models", Host=host)[0] == 421
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "http://["):
        assert post(server, body, Origin=origin)[0] == 403
    assert post(server, body, Origin="http://localhost:3000")[0] == 200
    assert post(server, body, Host="localhost:1")[0] == 200


@pytest.mark.parametrize("head", ["", "Content-Length: -1\r\n", "Content-Length: 99999999999\r\n"])
def test_bodies_without_an_honest_length_are_not_read(server, head):
    with socket.create_connection(server.server_address[:2], timeout=DEADLINE_S) as client:
        client.sendall(
            f"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\n{head}\r\n".encode()
        )
        assert client.makefile("rb").readline().split()[1] in (b"411", b"413")


def test_it_listens_on_loopback_and_a_port_in_use_is_told(server):
    host, port = server.server_address[:2]
    assert host == "127.0.0.1"
    with pytest.raises(ConfigError, match=f"port {port}: Address already in use"):
        ChatServer(server.model, "127.0.0.1", port)


def test_a_model_that_fails_for_good_ends_the_server(served_policy, monkeypatch):
    def fail(self):
        raise RuntimeError("[metal::malloc] Resource limit exceeded.")

    monkeypatch.setattr("mlx_lm.server.BatchGenerator.next", fail)
    limits = ServeLimits(max_tokens=4, temperature=0.0, rows=2, cache_bytes=None)
    said: list[str] = []

    def ask(url: str) -> None:
        with suppress(OSError, HTTPException):
            fetch(url, json.dumps({"messages": user("hello")}).encode())

    def tell(line: str) -> None:
        said.append(line)
        url = line.split()[0] + "/chat/completions"
        threading.Thread(target=ask, args=(url,), daemon=True).start()

    with pytest.raises(LocalRLError, match="The model failed while it answered"):
        serve(ServedModel(served_policy, Names("tiny", None), limits), "127.0.0.1", 0, tell)
    assert said[0].endswith("models: tiny (the base); Ctrl-C ends it")
