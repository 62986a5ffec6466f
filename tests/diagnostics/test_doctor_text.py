"""What doctor says of tokenizers and templates."""

from __future__ import annotations

import pytest
import tiny
from byte_tokenizers import CHATML, folder_with

from localrl.diagnostics.doctor_text import template_rows, tokenizer_row
from localrl.policy.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("base") / "model")


def rows_of(folder):
    tokenizer = load_tokenizer(folder)
    rows = [tokenizer_row(tokenizer, folder), *template_rows(tokenizer)]
    return {row.id: row for row in rows}


def test_an_end_of_turn_that_only_the_template_knows(base, tmp_path):
    rows = rows_of(folder_with(base, tmp_path / "m", CHATML))
    assert {row.status for row in rows.values()} == {"ok"}
    assert rows["end_of_turn"].text == (
        "a completion ends with '<|end|>', '<|im_end|>'; '<|im_end|>' is only found in the "
        "template, the configuration does not name it"
    )


def test_an_end_of_turn_that_is_no_token(base, tmp_path):
    template = "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n### end\n{% endfor %}"
    row = rows_of(folder_with(base, tmp_path / "m", template))["end_of_turn"]
    assert row.status == "warn"
    assert "the template ends a turn with '### end'" in row.text
    assert "rollout.stop_text" in str(row.todo)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (CHATML.replace("<|im_end|>\n", ""), "no end was found by rendering a turn"),
        (CHATML.replace("<|im_end|>", "<|im_end|><|end|>"), "ends a turn with '<|im_end|><|end|>'"),
        ("{{ messages[0].content }}", "no end was found by rendering a turn"),
    ],
)
def test_an_end_of_turn_that_is_not_found_is_not_ok(base, tmp_path, template, told):
    row = rows_of(folder_with(base, tmp_path / "m", template))["end_of_turn"]
    assert row.status == "warn"
    assert told in row.text


def test_an_end_of_turn_after_the_last_one_only(base, tmp_path):
    template = CHATML.replace("<|im_end|>\n", "") + "{% if not add_generation_prompt %}<|end|>"
    row = rows_of(folder_with(base, tmp_path / "m", template + "{% endif %}"))["end_of_turn"]
    assert (row.status, row.text) == ("ok", "a completion ends with '<|end|>'")


def test_a_template_that_demands_a_system_message(base, tmp_path):
    demand = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
    rows = rows_of(folder_with(base, tmp_path / "m", demand + CHATML))
    assert rows["template"].status == "warn"
    assert "task.system" in str(rows["template"].todo)
    assert rows["end_of_turn"].status == "ok"


def test_a_base_model(base, tmp_path):
    rows = rows_of(folder_with(base, tmp_path / "m"))
    assert rows["template"].status == "warn"
    assert rows["end_of_turn"].text == "a completion ends with '<|end|>'"


def test_a_tokenizer_that_loses_text(tmp_path):
    row = rows_of(tiny.make_folder(tmp_path / "m", bits=None, **tiny.FAMILIES["qwen3_5"]))[
        "tokenizer"
    ]
    assert row.status == "fail"
    assert row.text.startswith("text is lost: 'The sum of 12")
