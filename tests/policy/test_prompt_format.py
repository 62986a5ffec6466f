"""How a model's prompts begin and its turns end, and the text that rewards see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
from byte_tokenizers import CHATML, folder_with
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from localrl.errors import ConfigError, DataError
from localrl.policy.prompt_format import continued
from localrl.policy.roundtrip import check_tokenizer, find_faults
from localrl.policy.templated import find_templated
from localrl.policy.tokenizer import load_tokenizer
from localrl.policy.turns import read_calls
from localrl.records import Example
from localrl.settings import ModelConfig

USER = {"role": "user", "content": "What is 6 * 7?"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model folder, whose tokenizer the tests replace."""
    return tiny.make_folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def opened(base, tmp_path):
    """Opens a tokenizer with a template and settings."""

    def open_tokenizer(template: str | None = None, wish: ModelConfig | None = None, **changes):
        place = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        return load_tokenizer(folder_with(base, place, template, **changes), wish or ModelConfig())

    return open_tokenizer


def ends(tokenizer) -> set[str]:
    return {tokenizer.inner.convert_ids_to_tokens(token) for token in tokenizer.end_ids}


def turn(before: str, after: str, more: str = "") -> str:
    """A template that writes the model's turns between these texts, and `more` after the last."""
    return (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}<user>{{{{ m.content }}}}\n"
        f"{{% else %}}{before}{{{{ m.content }}}}{after}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{before}{{% else %}}{more}{{% endif %}}"
    )


def refusing(condition: str) -> str:
    """The beginning of a template that refuses such conversations."""
    return f"{{% if {condition} %}}{{{{ raise_exception('no') }}}}{{% endif %}}"


BETWEEN = (
    "{% for m in messages %}{% if not loop.first %}<|eot|>{% endif %}"
    "<|im_start|>{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHATML, {"<|im_end|>"}),
        (turn("<|im_start|>", "<|eot|>"), {"<|eot|>"}),
        (turn("", "\n\n<|eot|>\n"), {"<|eot|>"}),
        (turn("A: ", "</s>"), {"</s>"}),
        (turn("A: ", "<|eot|><|im_end|>", more="</s>"), {"<|eot|>"}),  # as within a conversation
        (turn("A: ", "<|eot|>", more="<|end|>"), {"<|eot|>"}),
        (turn("A: ", "<think></think><|end|>"), set()),  # the end that is known follows
        (turn("A: ", "", more="<|end|>"), set()),
        (turn("A: ", "", more="<|eot|>"), set()),  # what follows the last turn only
        (turn("A: ", "").replace("{% if add", "<|eot|>{% if add"), set()),
        (turn("A: ", "\n### end\n"), set()),  # text
        (turn("A: ", ""), set()),
        (turn("<|im_start|>", "") + "<|im_start|>", set()),  # the beginning of another turn
        ("{{ messages[0].content }}", set()),
        (turn("A: ", "{{ raise_exception('no') }}"), set()),
        (refusing("messages[-1].role == 'assistant'") + CHATML, {"<|im_end|>"}),
        (refusing("messages[-1].role == 'assistant'") + turn("<|im_start|>", ""), set()),
        (refusing("messages[0].role != 'system'") + CHATML, {"<|im_end|>"}),
        (CHATML.replace("m.content", "m.content | upper"), {"<|im_end|>"}),
        (BETWEEN, {"<|eot|>"}),  # only when another message follows
    ],
)
def test_the_end_of_a_turn_is_found_by_rendering_one(opened, template, found):
    tokenizer = opened(template)
    assert ends(tokenizer) == {"<|end|>", *found}
    assert tokenizer.unnamed == bool(found)
    assert tokenizer.inner.eos_token_ids == tokenizer.end_ids


def test_more_end_tokens_are_named(opened):
    assert ends(opened(CHATML, ModelConfig(end_tokens=("</s>", "<|eot|>")))) == {
        "<|end|>", "</s>", "<|eot|>", "<|im_end|>",
    }  # fmt: skip
    assert not opened(CHATML, ModelConfig(end_tokens=("<|im_end|>",))).unnamed
    for text in ("STOP", "<|nothing|>", ""):
        with pytest.raises(ConfigError, match=r"not one token of this model.*rollout.stop_text"):
            opened(CHATML, ModelConfig(end_tokens=(text,)))


def test_the_token_for_unknown_characters_is_named_by_the_file(opened):
    own = dict.fromkeys(["<unk>", "a"], 0.0)

    def build(tokenizer: Tokenizer) -> None:
        tokenizer.model = models.Unigram([*own.items()], 0)

    assert opened(build=build).unknown_id == 0
    assert opened().unknown_id is None


def begins(*pieces: str):
    """Lets a tokenizer put special tokens around texts, as post-processors do."""

    def build(tokenizer: Tokenizer) -> None:
        tokens = [(p, tokenizer.token_to_id(p)) for p in pieces if p != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(" ".join(pieces), None, tokens)

    return build


@pytest.mark.parametrize(
    ("pieces", "begin"),
    [(("<s>", "$A"), ["<s>"]), (("$A",), []), (("<s>", "$A", "</s>"), ["<s>"]),
     (("<s>", "<|eot|>", "$A"), ["<s>", "<|eot|>"]), (("$A", "</s>"), [])],
)  # fmt: skip
def test_without_a_template_texts_begin_as_in_transformers(opened, pieces, begin):
    tokenizer = opened(build=begins(*pieces))
    names = tokenizer.inner.convert_ids_to_tokens
    ids = tokenizer.encode([USER])
    assert names(list(ids[: len(begin)])) == begin
    whole = tokenizer.inner.encode(USER["content"])
    assert list(ids) == whole[: len(whole) - ("</s>" in pieces)]
    again = tokenizer.encode([{**USER, "content": "".join(begin) + USER["content"]}])
    assert again == ids  # what begins so already gets it once
    assert tokenizer.encode_text("a") == tokenizer.encode_text("aa")[:1]


def test_a_template_begins_texts_by_itself(opened):
    tokenizer = opened(CHATML, build=begins("<s>", "$A"))
    assert tokenizer.inner.decode(list(tokenizer.encode([USER]))).startswith("<|im_start|>user")


def test_prompts_as_they_are(opened):
    tokenizer = opened(CHATML, ModelConfig(chat_template="off"), build=begins("<s>", "$A"))
    raw = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    text = tokenizer.inner.decode(list(tokenizer.encode([{"role": "user", "content": raw}])))
    assert text == f"<s>{raw}"
    assert find_templated([Example("e", ({"role": "user", "content": raw},))], tokenizer) == []
    with pytest.raises(DataError, match="Without a chat template"):
        tokenizer.encode([USER], tools=[{"type": "function"}])
    with pytest.raises(ConfigError, match="no enable_thinking"):
        opened(CHATML, ModelConfig(chat_template="off", thinking="on"))


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("<think>6 * 7</think>42<|im_end|>", "<think>6 * 7</think>42"),
        ("42<|end|>", "42"),
        ("<s>4</s>2", "<s>4</s>2"),
        ("it is n't , done .", "it is n't , done ."),
        ("", ""),
    ],
)
def test_rewards_see_all_but_what_ends_a_completion(opened, text, seen):
    tokenizer = opened(CHATML, clean_up_tokenization_spaces=True)
    assert tokenizer.decode(tokenizer.encode_text(text)) == seen


def test_half_of_a_character_is_no_traceback(opened):
    with pytest.raises(DataError, match="half of a character"):
        opened(CHATML).encode([{"role": "user", "content": "a\ud83d"}])


plain = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1)
PLAIN = {
    "chatml": CHATML,
    "trims": CHATML.replace("m.content", "m.content | trim"),
    "spaces": turn(" [A] ", "</s>"),
}


@pytest.fixture(scope="module", params=PLAIN)
def templated(request, base, tmp_path_factory):
    place = tmp_path_factory.mktemp("plain") / "model"
    return load_tokenizer(folder_with(base, place, PLAIN[request.param]))


@settings(max_examples=15, derandomize=True, deadline=None)
@given(plain.filter(str.strip))
def test_a_turn_is_continued_as_in_transformers(templated, begun):
    messages = [USER, {"role": "assistant", "content": begun}]
    expected = templated.inner._tokenizer.apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    (text,) = templated.prompt_texts([Example("e", tuple(messages))])
    assert text == expected
    assert templated.encode(messages) == templated.encode_text(expected)


@pytest.mark.parametrize(
    ("before", "whole", "begun", "text"),
    [
        # The template puts empty thoughts before answers, and the model is to begin with its own.
        ("<a>", "<a><think></think>\n<think>So<e>", "<think>So", "<a><think>So"),
        # The prompt opens the thoughts already.
        ("<a><think>\n", "<a>So<e>", "<think>\nSo", "<a><think>\nSo"),
        ("<a><think>\n", "<a>So<e>", "So", "<a><think>\nSo"),
        # The template leaves out the message, or changes it.
        ("<a>", "", "So", "<a>So"),
        ("<a>", "<a>so<e>", "So", "<a>So"),
        ("<a>", "<a>So it is So<e>", "So", "<a>So"),
    ],
)
def test_a_turn_is_continued_where_templates_write_more(before, whole, begun, text):
    assert continued(before, whole, begun) == text


def test_prompts_with_and_without_tools_and_beginnings_keep_their_order(opened):
    tokenizer = opened("{{ tools | tojson if tools else '' }}" + CHATML)
    begun = {"role": "assistant", "content": "It is"}
    tools = ({"type": "function", "function": {"name": "add"}},)
    examples = [
        Example(str(n), (USER, begun) if n % 3 == 0 else (USER,), tools=tools if n % 2 else ())
        for n in range(9)
    ]
    assert tokenizer.encode_prompts(examples) == [
        tokenizer.encode(e.messages, tools=e.tools) for e in examples
    ]
    first, second, third = (str(text) for text in tokenizer.prompt_texts(examples[:3]))
    assert first.endswith("<|im_start|>assistant\nIt is")
    assert second.startswith('[{"type"')
    assert third.startswith("<|im_start|>user")
    assert third.endswith("assistant\n")


DATED = (
    "{{ strftime_now('%d %b %Y') }}{% macro m() %}{{ strftime_now('%Y') }}{% endmacro %}{{ m() }}"
)


def test_the_day_that_templates_see_is_fixed(opened):
    tokenizer = opened(DATED, ModelConfig(template_date="2024-02-29"))
    assert tokenizer.render([USER]) == "29 Feb 20242024"
    for wrong in ("2024-02-30", "2024-13-01"):
        with pytest.raises(ConfigError, match=r"template_date is '2024-.*YYYY-MM-DD"):
            opened(DATED, ModelConfig(template_date=wrong))


@pytest.mark.parametrize(
    ("template", "content", "mark"),
    [
        (CHATML, "<|im_start|>user\nhi<|im_end|>", "<|im_start|>"),
        (CHATML, "say <|im_end|>", "<|im_end|>"),
        (CHATML, "[INST] hi [/INST]", "[INST]"),
        (CHATML, "<|start_header_id|>user", "<|start_header_id|>"),
        (CHATML, "Write <think> and user, then answer.", None),
        (CHATML, "a < b | c > d <|endoftext|>", None),
        ("### Human: {{ messages[0].content }}\n### Bot:", "### Human: hi", "### Human:"),
        ("### Human: {{ messages[0].content }}\n### Bot:", "Human: hi", None),
        ("user {{ messages[0].content }}", "user hi", None),
        ("<s>{{ messages[0].content }}", "<s>hi", "<s>"),
    ],
)
def test_prompts_in_a_templates_format_are_noticed(opened, template, content, mark):
    example = Example("e", (USER, {"role": "user", "content": content}))
    found = find_templated([Example("fine", (USER,)), example], opened(template))
    assert found == ([(example, mark)] if mark else [])


HERMES = "{% if tools %}<tool_call>{{ tool_call.name }}{% endif %}" + CHATML
CALL = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("template", "begun", "text", "count"),
    [
        (HERMES, "", f"{CALL}{CALL}<|im_end|>", 2),
        (HERMES, "", f"<think>I could {CALL}</think>No.", 0),
        (HERMES, "", f"<think>I could {CALL}</think>{CALL}", 1),
        (HERMES, "", f"I could {CALL}</think>{CALL}", 1),
        (HERMES, "", f"<think>{CALL}</think>{CALL}<think>{CALL}</think>Done.", 0),
        (HERMES, "", f"<think>I could {CALL}", 0),
        (HERMES, "", f"<think>a</think>{CALL}<think>{CALL}", 1),
        (HERMES, "<think>", f"a</think>{CALL}<think>{CALL}{CALL}", 1),
        (HERMES, "", f"{CALL}<think>{CALL}", 1),
        (HERMES, "<think>\n", f"I could {CALL}", 0),
        (HERMES, "<think>a</think>", CALL, 1),
        (HERMES + "{% if add_generation_prompt %}<think>\n{% endif %}", "", f"hm {CALL}", 0),
        (HERMES + "{% if add_generation_prompt %}<think>\n{% endif %}", "", f"</think>{CALL}", 1),
        (HERMES + "{% if add_generation_prompt %}<think>\n{% endif %}", "", f"{CALL}<think>", 0),
    ],
)
def test_calls_in_thoughts_are_none(opened, template, begun, text, count):
    tokenizer = opened(template)
    calls = read_calls(tokenizer, tokenizer.encode_text(text), [], begun=begun)
    assert [call.name for call in calls] == ["add"] * count


def test_spaces_that_transformers_loses_are_found(tmp_path):
    folder = tiny.make_folder(tmp_path / "m", bits=None, **tiny.FAMILIES["qwen3_5"])
    tokenizer = load_tokenizer(folder)
    faults = find_faults(tokenizer, folder)
    assert [fault.loses_text for fault in faults] == [True, False]
    with pytest.raises(ConfigError, match=r"\(Qwen3_5Tokenizer\): text is lost: 'The sum of 12"):
        check_tokenizer(tokenizer, folder, strict=True)
    lost, other = check_tokenizer(tokenizer, folder, strict=False)
    assert "text is lost" in lost
    assert "otherwise than tokenizer.json" in other


def pieces(*parts):
    return lambda tokenizer: [setattr(tokenizer, name, part) for name, part in parts]


def normalised(*steps):
    from tokenizers import normalizers

    return pieces(("normalizer", normalizers.Sequence(list(steps))))


def sound() -> dict[str, object]:
    from tokenizers import normalizers as n

    return {
        "bytes": pieces(),
        "NFC": normalised(n.NFC()),
        "NFKC": normalised(n.NFKC()),
        "lower case": normalised(n.Lowercase(), n.StripAccents()),
        "spaces": normalised(n.Replace("\t", " ")),
        "prefix": pieces(("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))),
    }


@pytest.mark.parametrize("name", sound())
def test_what_a_normaliser_is_known_to_do_is_no_fault(base, tmp_path, name):
    folder = folder_with(base, tmp_path / "m", build=sound()[name])
    assert find_faults(load_tokenizer(folder), folder) == []


LOSSY: Sequence[tuple[str, object]] = (
    ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False)])),
    ("decoder", decoders.Sequence([decoders.ByteLevel(), decoders.Replace("  ", " ")])),
)  # fmt: skip


@pytest.mark.parametrize("part", LOSSY, ids=lambda part: part[0])
def test_what_does_not_come_back_is_a_fault(base, tmp_path, part):
    folder = folder_with(base, tmp_path / "m", build=pieces(part))
    (fault,) = find_faults(load_tokenizer(folder), folder)
    assert fault.loses_text
