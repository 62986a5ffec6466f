"""Every prompt of a task is rendered and counted before a run."""

from __future__ import annotations

import json
from datetime import date

import pytest
import tiny

from localrl.config import RunConfig, parse_setting
from localrl.errors import ConfigError, DataError
from localrl.policy.tokenizer import load_tokenizer
from localrl.records import Example
from localrl.tasks.files import load_file_task
from localrl.training.prompt_checks import check_prompts, warn_of_prompts
from localrl.training.prompt_lengths import read_prompts
from localrl.training.resuming import changed_settings, day_of_run

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>"
)


def user(text):
    return {"role": "user", "content": text}


def row(number, *messages, **more):
    messages = messages or (user(f"{number} + 1 = ?"),)
    return Example(f"id{number}", messages, place=f"d.jsonl, line {number}", **more)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tiny.make_folder(tmp_path_factory.mktemp("m") / "m", template=NO_SYSTEM)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unk_token": "<pad>"}))
    return load_tokenizer(folder)


def checked(tokenizer, rows):
    warned: list[str] = []
    lengths = check_prompts(rows, tokenizer, "mine")
    warn_of_prompts(rows, tokenizer, warned.append)
    return lengths, warned


def test_rows_are_counted_one_by_one(tokenizer):
    rows = [row(n) for n in range(1, 1100)]
    lengths, warned = checked(tokenizer, rows)
    assert lengths == [len(tokenizer.encode(example.messages)) for example in rows]
    assert warned == []


@pytest.mark.parametrize("places", [[1], [1050], [9, 1030, 1031], range(2, 30)])
def test_prompts_that_the_template_refuses_are_found_wherever_they_are(tokenizer, places):
    system = {"role": "system", "content": "be brief"}
    rows = [row(n, system, user("2")) if n in places else row(n) for n in range(1, 1060)]
    with pytest.raises(DataError) as caught:
        checked(tokenizer, rows)
    told = str(caught.value)
    assert told.startswith(f"d.jsonl, line {places[0]}: The model's chat template cannot render")
    assert "No system role" in told
    assert (f"{len(places)} of 1059 rows are bad" in told) == (len(places) > 1)


def test_characters_without_a_token_are_found_wherever_they_are(tokenizer):
    rows = [row(n, user("5 \u20ac" if n in (600, 700) else "5")) for n in range(1, 800)]
    with pytest.raises(
        ConfigError, match=r"no token for '€', which 2 of 799 prompts .* id600 \(d\.jsonl, line 600"
    ):
        checked(tokenizer, rows)


@pytest.mark.parametrize("character", ["é", "\0", "\u200b"])
def test_only_tokenizer_json_names_the_unknown_token(tiny_folder, character):
    tokenizer = load_tokenizer(tiny_folder)
    assert tokenizer.inner.unk_token_id is None
    rows = [row(n, user(f"sum {n} {character}")) for n in range(30)]
    with pytest.raises(ConfigError) as caught:
        checked(tokenizer, rows)
    told = f"no token for {character!r}, which 30 of 30 prompts"
    assert told in str(caught.value)
    assert tokenizer.unknown([user(f"a {character}")]) == character


def test_prompts_that_are_templated_already_are_told(tokenizer):
    rows = [row(1), row(2, user("<user>2 + 2<assistant>")), row(3, user("<user>3"))]
    (told,) = checked(tokenizer, rows)[1]
    assert told.startswith("2 of 3 prompts contain '<user>'")
    assert "id2 (d.jsonl, line 2)" in told
    assert "model.chat_template=off" in told


def test_prompts_that_begin_the_models_turn_are_told(tokenizer):
    begun = {"role": "assistant", "content": "it is "}
    (told,) = checked(tokenizer, [row(1), row(2, user("2"), begun)])[1]
    assert told.startswith("1 of 2 prompts end in a message of the assistant")


def test_tools_that_the_template_leaves_out_are_told(tokenizer):
    (told,) = checked(tokenizer, [row(1), row(2, tools=({"type": "function"},))])[1]
    assert "1 of 2 rows have tools, and this model's chat template shows none" in told


def task_of(tmp_path, texts):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": t, "answer": "1"}) + "\n" for t in texts))
    return load_file_task(file, ())


def config(most, *, leave_out, **more):
    settings = {"rollout.max_prompt_tokens": most, "task.filter_overlong_prompts": leave_out}
    return RunConfig.create({"task.name": "rows.jsonl", **settings, **more})


TEXTS = [str(10**n) for n in range(20)]
"""Prompts of 3 to 22 tokens, with two of the template."""


def test_overlong_prompts_are_listed_with_their_lines(tmp_path, tokenizer):
    task = task_of(tmp_path, TEXTS)
    with pytest.raises(DataError) as caught:
        read_prompts(config(15, leave_out=False), task, tokenizer)
    told = str(caught.value)
    assert "tokens; 1 to 15 are allowed. 7 of 20 are too long" in told
    assert "and 1 more" in told
    assert told.count("rows.jsonl, line") == 6
    assert "Raise rollout.max_prompt_tokens to 22, or leave such rows out with" in told


def test_overlong_prompts_are_left_out_and_counted(tmp_path, tokenizer):
    task, warned = task_of(tmp_path, TEXTS), []
    fewer, length = read_prompts(config(15, leave_out=True), task, tokenizer, warned.append)
    kept = [*map(fewer.train, range(fewer.train_size)), *fewer.evaluation(99)]
    assert sorted(e.messages[0]["content"] for e in kept) == sorted(TEXTS[:13])
    assert length.tokens == 15
    assert fewer.description.endswith("; 7 of these left out as too long")
    assert warned == [
        "task.filter_overlong_prompts leaves out 7 of 20 prompts, which have more than 15 tokens "
        "(the longest has 22)"
    ]
    same, _ = read_prompts(config(22, leave_out=True), task, tokenizer, warned.append)
    assert same is task
    assert len(warned) == 1
    with pytest.raises(DataError, match=r"leaves out all .* rows of rows"):
        read_prompts(config(2, leave_out=True), task, tokenizer)


def test_rows_of_two_tables_may_have_the_same_id(tmp_path, tokenizer):
    for name, texts in {"train": ["1", "22", "333"], "test": ["4444444", "5", "6"]}.items():
        rows = [json.dumps({"id": n, "prompt": text}) + "\n" for n, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    task = load_file_task(tmp_path, ())
    fewer, _ = read_prompts(config(6, leave_out=True), task, tokenizer)
    assert fewer.train_size == 3
    assert [e.messages[0]["content"] for e in fewer.evaluation(9)] in (["5", "6"], ["6", "5"])
    whole = load_file_task(f"{tmp_path}:test", (), hold_out="all")
    fewer, _ = read_prompts(config(6, leave_out=True), whole, tokenizer, trains=False)
    assert fewer.description.endswith("; 1 of these left out as too long")
    assert len(fewer.evaluation(9)) == 2


def test_held_out_rows_behind_the_overlong_ones_are_evaluated(tmp_path, tokenizer):
    task = task_of(tmp_path, [*TEXTS, *map(str, range(2, 200))])
    few = config(6, leave_out=True, **{"task.eval_prompts": 9})
    fewer, _ = read_prompts(few, task, tokenizer, trains=False)
    assert len(fewer.evaluation(9)) == 9
    assert fewer.train_size == task.train_size


def test_a_resumed_run_may_allow_longer_prompts_but_not_shorter_ones():
    old = RunConfig()
    for limit in (513, 4096):
        new = old.replace("rollout.max_prompt_tokens", limit)
        assert changed_settings(old, new) == {"rollout.max_prompt_tokens": (512, limit)}
    with pytest.raises(ConfigError, match=r"max_prompt_tokens was 512 and is 511.*may be raised"):
        changed_settings(old, old.replace("rollout.max_prompt_tokens", 511))
    filters = old.replace("task.filter_overlong_prompts", True)
    with pytest.raises(ConfigError, match=r"max_prompt_tokens was 512 and is 513.*leaves out rows"):
        changed_settings(filters, filters.replace("rollout.max_prompt_tokens", 513))
    assert changed_settings(old, old.replace("task.agent_timeout_s", 90.0))
    with pytest.raises(ConfigError, match=r"max_completion_tokens was 256 and is 300"):
        changed_settings(old, old.replace("rollout.max_completion_tokens", 300))


def test_a_day_is_written_as_text_or_as_toml_has_it(tmp_path):
    for written in ('"2024-02-29"', "2024-02-29"):
        (tmp_path / "c.toml").write_text(f"[model]\ntemplate_date = {written}\n")
        read = RunConfig.create(file=tmp_path / "c.toml")
        assert read.model.template_date == "2024-02-29"
    assert parse_setting("model.template_date=2024-02-29")[1] == date(2024, 2, 29)
    assert RunConfig().replace("model.template_date", date(2024, 2, 29)) == RunConfig().replace(
        "model.template_date", "2024-02-29"
    )
    with pytest.raises(ConfigError, match="form is wrong"):
        RunConfig().replace("model.template_date", "yesterday")


def test_the_day_of_a_run_stays_its_own(tmp_path):
    new = RunConfig.create({"run.out": str(tmp_path)})
    assert day_of_run(new) is None
    dated = new.replace("model.template_date", "2024-02-29")
    (tmp_path / "config.toml").write_text(dated.to_toml())
    assert day_of_run(new) == "2024-02-29"
    assert changed_settings(new, dated)  # an older run has none, and may be resumed
    with pytest.raises(ConfigError, match=r"template_date was '2024-02-29' and is '2024-03-01'"):
        changed_settings(dated, dated.replace("model.template_date", "2024-03-01"))
