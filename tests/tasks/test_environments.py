"""Environments and tools in the worker's child, through the real thing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from localrl.errors import ConfigError, DataError, RewardError
from localrl.policy.tokenizer import load_tokenizer
from localrl.processes.worker import Worker
from localrl.records import Example, Group, Leaf, ModelTurn, Node
from localrl.rewards.scoring import Scorer
from localrl.tasks.environments import open_environments

HERE = Path(__file__).parent / "playground.py"
HERMES = (
    "{% if tools %}<user>{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<assistant>{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}"
    "<tool_call>{{ tool_call.name }}</tool_call>{% endfor %}"
    "<end>"
    "{% else %}<user>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

EXTRA = ("<tool_call>", "</tool_call>", *'{}":,._/[]')


def example(start=5, name="", **columns):
    messages = ({"role": "user", "content": "count"},)
    return Example(f"{name}{start}", messages, columns={"start": start, **columns})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tiny.make_folder(
        tmp_path_factory.mktemp("talks") / "model", template=HERMES, extra=EXTRA
    )
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def worker():
    with Worker(time_limit_s=20, memory_limit_bytes=None) as worker:
        yield worker


class Talk:
    """Says one thing after the other to environments, and keeps what it hears."""

    def __init__(self, worker, tokenizer, factory=None, tools=(), limit_s=5.0):
        self.warned: list[str] = []
        places = [f"{HERE}:{tool}" for tool in tools]
        factory = factory and f"{HERE}:{factory}"
        found = open_environments(factory, places, worker, limit_s=limit_s, warn=self.warned.append)
        assert found is not None
        self.environments, self.tokenizer, self.worker = found, tokenizer, worker
        found.connect(tokenizer)

    def say(self, *lines, reason="stop"):
        """Lines are (example, conversation, text)."""
        spoken = []
        for example, conversation, text in lines:
            ids = (*self.tokenizer.encode_text(text), 3)
            spoken.append(ModelTurn(example, conversation, ids, text, reason))
        return self.environments.answer(spoken)


def said(heard):
    return [message["content"] for message in heard.messages[1:]]


def test_an_environment_that_plays_in_text(worker, tokenizer):
    talk = Talk(worker, tokenizer, "Countdown")
    (kind,) = talk.environments.kinds.values()
    assert (kind.name, kind.plays_in_text, kind.owns_reward) == ("Countdown", True, True)
    two, one = example(2), example(1)
    prompts = talk.environments.prompts([two, one])
    assert tokenizer.inner.decode(prompts[0]) == "<user>count from 2<assistant>"
    first = talk.say((two, None, "a"), (one, None, "b"))
    assert [said(heard) for heard in first] == [["1"], ["0"]]
    assert tokenizer.inner.decode(first[0].token_ids) == "<user>1<assistant>"
    second = talk.say((two, first[0].conversation, "a"), (one, first[1].conversation, "stop"))
    assert said(second[0]) == ["0"]
    assert second[1].over
    assert said(second[1]) == []
    assert not second[1].failed


def test_an_answer_begins_with_the_end_token_where_the_model_wrote_none(worker, tokenizer):
    talk = Talk(worker, tokenizer, "Countdown")
    talk.environments.prompts([example(2)])
    spoken = ModelTurn(example(2), None, tokenizer.encode_text("go"), "go", "closed")
    (heard,) = talk.environments.answer([spoken])
    assert tokenizer.inner.decode(heard.token_ids) == "<end><user>1<assistant>"


def test_a_turn_that_the_prompt_begins_is_heard_whole(worker, tokenizer):
    talk = Talk(worker, tokenizer, "Countdown")
    begun = {"role": "assistant", "content": "st"}
    row = example(0)
    row = replace(row, messages=(*row.messages, begun))
    (prompt,) = talk.environments.prompts([row])
    assert tokenizer.inner.decode(prompt) == "<user>count from 0<assistant>st"
    (heard,) = talk.say((row, None, "op"))
    assert heard.over
    assert heard.messages == ({"role": "assistant", "content": "stop"},)


def test_half_of_a_character_in_a_reply_ends_no_run(worker, tokenizer):
    talk = Talk(worker, tokenizer, "Torn")
    (prompt,) = talk.environments.prompts([example(1)])
    assert tokenizer.inner.decode(prompt) == "<user>count<pad><assistant>"
    (heard,) = talk.say((example(1), None, "go"))
    assert said(heard) == ["\ufffd\U0001f600"]


def test_a_row_with_tools_of_its_own_in_an_environment_with_tools(worker, tokenizer):
    row = replace(example(), tools=({"type": "function", "function": {"name": "own"}},))
    with pytest.raises(DataError, match="has `tools` of its own"):
        Talk(worker, tokenizer, "Shop").environments.prompts([row])
    (prompt,) = Talk(worker, tokenizer, "Countdown").environments.prompts([row])
    assert tokenizer.inner.decode(prompt).startswith("<user>own <user>count from 5")


def test_a_fork_gets_an_environment_of_its_own(worker, tokenizer):
    talk = Talk(worker, tokenizer, "Countdown")
    talk.environments.prompts([example(3)])
    (heard,) = talk.say((example(3), None, "a"))
    number = heard.conversation
    left, right = talk.say((example(3), number, "a"), (example(3), number, "b"))
    assert left.conversation == number != right.conversation
    (left,) = talk.say((example(3), left.conversation, "a"))
    assert said(left) == ["0"]
    (right,) = talk.say((example(3), right.conversation, "b"))
    assert said(right) == ["0"]


def call(name, arguments):
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def test_tools_of_an_environment_and_of_their_own(worker, tokenizer):
    talk = Talk(worker, tokenizer, "Shop", tools=["multiply"])
    (kind,) = talk.environments.kinds.values()
    names = [schema["function"]["name"] for schema in kind.schemas]
    assert names == ["multiply", "buy", "price"]
    parameters = kind.schemas[1]["function"]["parameters"]
    assert parameters["required"] == ["item"]
    assert parameters["properties"]["count"] == {
        "type": "integer",
        "description": "How many of it.",
    }
    row = example()
    (prompt,) = talk.environments.prompts([row])
    assert tokenizer.inner.decode(prompt).startswith("<user>multiply buy price <user>count")
    (heard,) = talk.say((row, None, "first " + call("multiply", '{"a": 6, "b": 7}')))
    assert said(heard) == ["42"]
    assert heard.messages[0]["tool_calls"][0]["function"]["arguments"] == {"a": 6, "b": 7}
    assert heard.messages[1] == {"role": "tool", "name": "multiply", "content": "42"}
    assert tokenizer.inner.decode(heard.token_ids) == "<user>42<assistant>"
    both = call("buy", '{"item": "tea", "count": 2}') + call("price", '{"item": "tea"}')
    (heard,) = talk.say((row, heard.conversation, both))
    assert said(heard) == ["2 in the basket", "1.5"]
    (heard,) = talk.say((row, heard.conversation, "that is all"))
    assert heard.over
    assert talk.environments.take_counts() == (3, 0)
    assert talk.environments.take_counts() == (0, 0)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (call("divide", '{"a": 1, "b": 0}'), "division by zero"),
        (call("divide", '{"a": 1}'), "missing 1 required positional argument"),
        (call("fly", "{}"), "Tool fly not found."),
        ("<tool_call>divide 1 by 2</tool_call>", "not a valid tool call"),
        (call("divide", '"[1, 2]"'), "not a valid tool call"),
        (call("sleep", "{}"), "took more than 0.5 s"),
        (call("spin", "{}"), "took more than 0.5 s"),
    ],
)
def test_a_tool_that_fails_is_an_error_shown_to_the_model(worker, tokenizer, text, shown):
    talk = Talk(worker, tokenizer, tools=["divide", "sleep", "spin"], limit_s=0.5)
    talk.environments.prompts([example()])
    bad, good = talk.say(
        (example(), None, text), (example(), None, call("divide", '{"a": 4, "b": 2}'))
    )
    assert shown in said(bad)[0]
    assert said(bad)[0].startswith("{'error': ")
    assert not bad.failed
    assert said(good) == ["2.0"]
    assert talk.environments.take_counts() == (2, 1)
    assert not talk.warned


def test_a_tool_that_ends_the_process_ends_its_conversations_and_no_more(worker, tokenizer):
    talk = Talk(worker, tokenizer, tools=["multiply", "leave"])
    talk.environments.prompts([example()])
    heard = talk.say((example(), None, call("leave", "{}")), (example(), None, call("fly", "{}")))
    assert [each.failed for each in heard] == [True, True]
    assert "exited with status 3" in talk.warned[0]
    talk.environments.prompts([example()])
    (heard,) = talk.say((example(), None, call("multiply", '{"a": 6, "b": 7}')))
    assert said(heard) == ["42"]


def test_an_environment_that_breaks_has_no_reward(worker, tokenizer):
    talk = Talk(worker, tokenizer, "Fragile")
    talk.environments.prompts([example(3), example(9)])
    bad, good = talk.say((example(3), None, "a"), (example(9), None, "a"))
    assert bad.failed
    assert not good.failed
    assert "KeyError: 'three'. 1 of 2" in talk.warned[0]
    lines = [(example(3), None, "a")] * 60
    with pytest.raises(RewardError, match=r"broke in \d+% of the last 62 turns"):
        talk.say(*lines)
    assert len(talk.warned) == 1


def test_reset_must_depend_on_the_row_alone(worker, tokenizer):
    talk = Talk(worker, tokenizer, "Whims")
    talk.environments.prompts([example()])
    (heard,) = talk.say((example(), None, "a"))
    assert heard.failed
    assert "two different texts for one row" in talk.warned[0]


def test_kinds_by_the_column_environment(worker, tokenizer):
    talk = Talk(worker, tokenizer, "BOTH")
    shop, count = example(1, "s", environment="shop"), example(2, "c", environment="countdown")
    prompts = talk.environments.prompts([shop, count])
    assert tokenizer.inner.decode(prompts[0]) == "<user>buy price <user>count<assistant>"
    assert tokenizer.inner.decode(prompts[1]) == "<user>count from 2<assistant>"
    bought, counted = talk.say(
        (shop, None, call("buy", '{"item": "tea"}')), (count, None, call("buy", '{"item": "tea"}'))
    )
    assert said(bought) == ["1 in the basket"]
    assert said(counted) == ["1"]
    names = [spec.name for spec in talk.environments.rewards]
    assert names == ["Shop", "Countdown"]
    with pytest.raises(DataError, match=r"is 'circus'; .* has 'shop', 'countdown'"):
        talk.environments.prompts([example(environment="circus")])


def group_of(*heard, start=2):
    nothing = np.zeros(0, np.float32)
    ids = Node(-1, nothing.astype(int), nothing.astype(bool), nothing, nothing)
    leaves = tuple(
        Leaf(0, "stop", "", messages=each.messages, conversation=each.conversation)
        for each in heard
    )
    return Group(example(start), (), (ids,), leaves, len(leaves))


def test_rewards_are_the_environments_own_and_see_them(worker, tokenizer):
    talk = Talk(worker, tokenizer, "Countdown")
    talk.environments.prompts([example(1)])
    won, lost = talk.say((example(1), None, "go"), (example(1), None, "stop"))
    (won,) = talk.say((example(1), won.conversation, "stop"))
    specs = (*talk.environments.rewards, *_specs(f"{HERE}:rewards_left"))
    scorer = Scorer(specs, worker, talk.warned.append)
    scorer.check(["start"])
    (scored,) = scorer.score([group_of(won, lost, start=1)])
    assert scored.parts == {"Countdown": (1.0, 0.0), "rewards_left": (0.0, 1.0)}
    assert not talk.warned


def _specs(target):
    from localrl.rewards.catalog import parse_rewards

    return parse_rewards([target])


def test_the_reward_of_a_conversation_that_is_gone_is_none(worker, tokenizer):
    talk = Talk(worker, tokenizer, "Countdown")
    talk.environments.prompts([example(1)])
    (heard,) = talk.say((example(1), None, "go"))
    worker.close()
    scorer = Scorer(talk.environments.rewards, worker, talk.warned.append)
    (scored,) = scorer.score([group_of(heard)])
    assert scored.rewards == (None,)


@pytest.mark.parametrize(
    ("factory", "tools", "error", "message"),
    [
        ("Nobody", (), ConfigError, "has no 'Nobody'. Name it as file.py:Name"),
        ("Mute", (), DataError, "Mute has neither step\\(text\\) nor a method"),
        ("NoReset", (), DataError, "NoReset has no method reset"),
        ("Countdown", ("multiply",), DataError, "plays in text, so it cannot have tools"),
        (None, ("nothing",), ConfigError, "has no 'nothing'"),
        (None, ("HERE",), ConfigError, "has no 'HERE'"),
    ],
)
def test_what_cannot_be_an_environment(worker, tokenizer, factory, tools, error, message):
    with pytest.raises(error, match=message):
        Talk(worker, tokenizer, factory, tools)


def test_a_model_that_knows_no_calls_cannot_have_tools(worker, tmp_path):
    plain = load_tokenizer(tiny.make_folder(tmp_path / "plain"))
    with pytest.raises(ConfigError, match="no tool call format"):
        Talk(worker, plain, tools=["multiply"])
