"""Written conversations in tokens: as the model's own would be, and only its turns are its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from byte_tokenizers import CHATML, folder_with

from localrl.config import RunConfig
from localrl.errors import DataError
from localrl.policy.conversation import EncodedConversation, encode_conversations
from localrl.policy.loading import find_model
from localrl.policy.tokenizer import Tokenizer, load_tokenizer
from localrl.policy.turns import answer_ids
from localrl.records import Example
from localrl.runs.logs import read_jsonl
from localrl.train import train

ASKS = {"role": "user", "content": "2 + 2?"}
SAYS = {"role": "assistant", "content": "4, I think"}
AGAIN = {"role": "user", "content": "Sure?"}
YES = {"role": "assistant", "content": "\n yes "}
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>"
    "\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BEGUN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def opened(base, tmp_path):
    def open_tokenizer(template: str | None = CHATML) -> Tokenizer:
        return load_tokenizer(folder_with(base, tmp_path / "model", template))

    return open_tokenizer


def encode(tokenizer: Tokenizer, *completion, prompt=(ASKS,)) -> EncodedConversation | DataError:
    example = Example("a", tuple(prompt), place="rows.jsonl, line 3")
    return encode_conversations(tokenizer, [example], [completion])[0]


def parts(tokenizer: Tokenizer, found: EncodedConversation | DataError) -> list[tuple[bool, str]]:
    """The text after the prompt in runs: True for what the model wrote, and the text."""
    assert isinstance(found, EncodedConversation)
    runs: list[tuple[bool, str]] = []
    pieces = tokenizer.pieces(found.token_ids.tolist())
    for own, piece in zip(found.by_model.tolist(), pieces, strict=True):
        if runs and runs[-1][0] == own:
            runs[-1] = (own, runs[-1][1] + piece)
        else:
            runs.append((own, piece))
    return runs


def test_a_turn_ends_as_a_sampled_one_does_and_follows_the_same_prompt(opened):
    tokenizer = opened()
    found = encode(tokenizer, SAYS)
    assert isinstance(found, EncodedConversation)
    assert found.prompt_ids == tokenizer.encode([ASKS])
    assert parts(tokenizer, found) == [(True, "4, I think<|im_end|>")]
    assert found.token_ids[-1] in tokenizer.end_ids


def test_every_turn_is_the_models_and_what_is_between_is_what_an_environment_puts_there(opened):
    tokenizer = opened()
    found = encode(tokenizer, SAYS, AGAIN, YES)
    assert parts(tokenizer, found) == [
        (True, "4, I think<|im_end|>"),
        (False, "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "\n yes <|im_end|>"),
    ]
    assert isinstance(found, EncodedConversation)
    between = found.token_ids[~found.by_model].tolist()
    assert tuple(between) == answer_ids(tokenizer, [AGAIN], ended=True)


@pytest.mark.parametrize(
    ("template", "said", "expected"),
    [
        (THINKING, SAYS | {"reasoning_content": "hm"}, "<think>\nhm\n</think>\n\n4, I think"),
        (THINKING, SAYS, "<think>\n\n</think>\n\n4, I think"),
        # The prompt begins the thoughts, and whole turns leave them out: the content is the turn.
        (BEGUN, SAYS | {"content": "hm</think>4"}, "hm</think>4"),
        (BEGUN, SAYS | {"content": "<think>hm</think>4"}, "hm</think>4"),
        (PLAIN, SAYS, " 4, I think"),
        (None, SAYS, "4, I think"),
    ],
)
def test_a_turn_is_what_the_template_writes_or_else_the_content(opened, template, said, expected):
    tokenizer = opened(template)
    [(own, text)] = parts(tokenizer, encode(tokenizer, said))
    end = "<|im_end|>" if template in (THINKING, BEGUN) else "<|end|>"
    assert (own, text) == (True, expected + end)


def test_a_sampled_conversation_with_tools_has_the_tokens_that_were_sampled(tmp_path):
    settings = {
        "model.path": "turns-0.1m",
        "task.name": "calculator:1",
        "task.eval_prompts": 0,
        "rollout.prompts_per_step": 2,
        "rollout.group_size": 4,
        "rollout.max_turns": 2,
        "run.steps": 1,
        "run.out": str(tmp_path / "run"),
    }
    train(RunConfig.create(settings), progress=False)
    tokenizer = load_tokenizer(find_model("turns-0.1m"))
    called = 0
    for record in read_jsonl(tmp_path / "run" / "rollouts.jsonl"):
        for leaf in record["leaves"]:
            if leaf["finish_reason"] != "stop":
                continue
            called += len(leaf["messages"]) > 1
            nodes = path_to(record["nodes"], leaf["node"])
            found = encode(tokenizer, *leaf["messages"], prompt=record["messages"])
            assert isinstance(found, EncodedConversation)
            assert found.token_ids.tolist() == [t for node in nodes for t in node["token_ids"]]
            own = [s for n in nodes for s in n.get("sampled") or [True] * len(n["token_ids"])]
            assert found.by_model.tolist() == own
    assert called


def path_to(nodes, end: int):
    found = []
    while end >= 0:
        found.append(nodes[end])
        end = nodes[end]["parent"]
    return found[::-1]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            SAYS | {"content": "hm</think>4<|im_end|>5"},
            r"line 3: .*contains '<\|im_end\|>', which ends",
        ),
        (SAYS | {"reasoning_content": "hm"}, "line 3: .*does not write reasoning or tool calls"),
        (SAYS, "line 3: the prompt begins .* with <think>, and this turn .* does not end them"),
    ],
)
def test_what_cannot_be_shown_is_an_error_that_names_the_row(opened, said, message):
    found = encode(opened(BEGUN), said)
    assert isinstance(found, DataError)
    assert re.search(message, str(found))
