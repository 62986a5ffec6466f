"""Written conversations in tokens: as the model's own would be, and only its turns are its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from byte_tokenizers import CHATML, folder_with

from localrl.errors import DataError
from localrl.policy.conversation import Written, encode_conversations
from localrl.policy.tokenizer import Tokenizer, load_tokenizer
from localrl.policy.turns import answer_ids
from localrl.records import Example
from localrl.settings import ModelConfig

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
    def open_tokenizer(template: str | None = CHATML, **wish: str) -> Tokenizer:
        folder = folder_with(base, tmp_path / str(len(list(tmp_path.iterdir()))), template)
        return load_tokenizer(folder, ModelConfig(**wish))

    return open_tokenizer


def encode(tokenizer: Tokenizer, *completion, prompt=(ASKS,)) -> Written | DataError:
    example = Example("a", tuple(prompt), place="rows.jsonl, line 3")
    return encode_conversations(tokenizer, [example], [completion])[0]


def parts(tokenizer: Tokenizer, found: Written | DataError) -> list[tuple[bool, str]]:
    """The text after the prompt in runs: True for what the model wrote, and the text."""
    assert isinstance(found, Written)
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
    assert isinstance(found, Written)
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
    assert isinstance(found, Written)
    between = found.token_ids[~found.by_model].tolist()
    assert tuple(between) == answer_ids(tokenizer, [AGAIN], ended=True)


@pytest.mark.parametrize(
    ("template", "said", "expected"),
    [
        (THINKING, SAYS | {"reasoning_content": "hm"}, "<think>\nhm\n</think>\n\n4, I think"),
        (THINKING, SAYS, "<think>\n\n</think>\n\n4, I think"),
        # The prompt begins the thoughts, and whole turns leave them out: the content is the turn.
        (BEGUN, SAYS, "4, I think"),
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


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (SAYS | {"content": "4<|im_end|>5"}, r"line 3: .*contains '<\|im_end\|>', which ends"),
        (SAYS | {"reasoning_content": "hm"}, "line 3: .*does not write reasoning or tool calls"),
    ],
)
def test_what_cannot_be_shown_is_an_error_that_names_the_row(opened, said, message):
    found = encode(opened(BEGUN), said)
    assert isinstance(found, DataError)
    assert re.search(message, str(found))
