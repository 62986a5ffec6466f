"""Chat templates in their child process: as transformers renders them, and hostile ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from transformers.utils.chat_template_utils import render_jinja_template

from localrl.errors import ConfigError, DataError
from localrl.memory.machine import resident_bytes
from localrl.policy import chat
from localrl.policy.chat import ChatTemplate, thinking_switch
from localrl.policy.tokenizer import load_tokenizer
from localrl.settings import ModelConfig

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Sum of <a> & b, naïvely",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "ü": "<&>"}}}
CONVERSATIONS = [
    [{"role": "user", "content": "What is 2 + 3?"}],
    [
        {"role": "system", "content": "  Be brief. \n"},
        {"role": "user", "content": "<b>&amp; {{ 7 * 7 }} {% raw %}"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n49", "reasoning": "hm"},
        {"role": "user", "content": "naïve, 数"},
    ],
    [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": '{"sum": 3}'},
        {"role": "user", "content": "and now?"},
    ],
]

CHATML = """{%- if messages[0]['role'] == 'system' -%}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages %}
    {%- if not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ (message.content or '') ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

THINKING = """{%- set ns = namespace(last=-1, multi=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" %}
        {%- set ns.multi = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- "<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- bos_token if loop.first else '' }}{{- message.role + ':' + content }}
    {%- for call in message.tool_calls or [] %}
        {%- if call.function %}{%- set call = call.function %}{%- endif %}
        {{- '<call>' + call.name + (call.arguments | tojson(indent=2)) + '</call>' }}
    {%- endfor %}
    {{- message.reasoning_content | default('none') }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'assistant:' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

LOOPS = """{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% generation %}
{{ message.role | upper }}: {{ message.content | default('', true) | trim }}
    {% endgeneration %}
    {% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{{ dict(a=1) | tojson }}{{ dict.fromkeys('ab', 0) | tojson(sort_keys=true) }}
{{ strftime_now('%Y') }}{{ eos_token }}"""

ALTERNATE = """{{ bos_token }}{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/...') }}
{% endif %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endfor %}"""

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("template", [CHATML, THINKING, LOOPS, ALTERNATE, tiny.TEMPLATE])
@pytest.mark.parametrize("variables", [TOKENS, {**TOKENS, "enable_thinking": False}])
def test_texts_are_those_of_transformers(template, variables):
    ours = ChatTemplate({"default": template}, variables)
    for messages in CONVERSATIONS[: 1 if template == ALTERNATE else None]:
        for tools in (None, [TOOL]):
            for go_on in (True, False):
                given = [{k: v for k, v in m.items() if v is not None} for m in messages]
                ((expected,), _) = render_jinja_template(
                    [given],
                    tools=tools,
                    chat_template=template,
                    add_generation_prompt=go_on,
                    **variables,
                )
                texts = ours.render([messages], tools=tools, add_generation_prompt=go_on)
                assert texts == [expected]


def test_a_tokenizer_renders_as_transformers_does(policy):
    tokenizer = policy.tokenizer
    expected = tokenizer.inner.apply_chat_template(
        CONVERSATIONS[0], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.render(CONVERSATIONS[0]) == expected


def test_many_are_rendered_at_once_and_in_order(monkeypatch):
    monkeypatch.setattr(chat, "BATCH", 3)
    template = ChatTemplate({"default": tiny.TEMPLATE}, {})
    many = [[{"role": "user", "content": str(n % 7)}] for n in range(20)]
    assert template.render(many) == [f"<user>{n % 7}<assistant>" for n in range(20)]


def test_long_conversations_are_rendered_in_calls_of_bounded_size(monkeypatch):
    monkeypatch.setattr(chat, "BATCH_CHARACTERS", 1000)
    sizes = [900, 900, 5, 5, 3000, 5, 400, 400]
    many = [[{"role": "user", "content": f"{n}" + "x" * size}] for n, size in enumerate(sizes)]
    keys = [json.dumps(messages) for messages in many]
    calls = list(chat._batches(keys))
    assert [len(call) for call in calls] == [1, 2, 1, 1, 3]
    assert [key for call in calls for key in call] == keys
    texts = ChatTemplate({"default": tiny.TEMPLATE}, {}).render(many)
    assert texts == [f"<user>{messages[0]['content']}<assistant>" for messages in many]


def test_texts_are_kept_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(chat, "KEPT", 1000)
    now = ChatTemplate({"default": "{{ range(99999) | random }}{{ messages[0].content }}"}, {})
    first, second = ([{"role": "user", "content": c * 300}] for c in "ab")
    before = now.render([first])
    assert now.render([second, first, first])[1:] == before * 2  # drawn once
    now.render([second])
    now.render([[{"role": "user", "content": "c" * 300}]])
    assert now.render([first]) != before  # forgotten, and drawn again


def test_a_template_of_its_own_for_tools():
    both = ChatTemplate({"default": "plain", "tool_use": "with tools"}, {})
    assert both.render(CONVERSATIONS[:1]) == ["plain"]
    assert both.render(CONVERSATIONS[:1], tools=[TOOL]) == ["with tools"]
    with pytest.raises(ConfigError, match="chat templates named rag, but no default"):
        ChatTemplate({"rag": "plain"}, {}).render(CONVERSATIONS[:1])


def test_what_a_template_refuses_is_shown():
    template = ChatTemplate({"default": ALTERNATE}, TOKENS)
    with pytest.raises(DataError, match=r"\[.*Be brief.*roles must alternate"):
        template.render([CONVERSATIONS[0], CONVERSATIONS[1]])


def test_what_a_template_says_cannot_drive_a_terminal():
    template = ChatTemplate({"default": "{{ raise_exception('\x1b[2J gone') }}"}, {})
    with pytest.raises(DataError) as caught:
        template.render(CONVERSATIONS[:1])
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ dict.__class__.x }}",
        "{{ '%s'|attr('format') }}{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_gets_nowhere(template):
    with pytest.raises((DataError, ConfigError), match="chat template"):
        ChatTemplate({"default": template}, {}).render(CONVERSATIONS[:1])


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubles": (
        "{% set ns = namespace(s='xxxxxxxx') %}"
        "{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
    ),
    "repeats": "{{ 'x' * 10**10 }}",
    "writes": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "recurses": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "is no template": "{% if %}",
    "nests": "(" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(monkeypatch, name):
    template = HOSTILE[name] if name != "nests" else "{{ " + HOSTILE[name] + " }}"
    before = resident_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(chat._worker(), "time_limit_s", 0.3)
        with pytest.raises(ConfigError, match="chat template is refused"):
            ChatTemplate({"default": template}, {}).render(CONVERSATIONS[:1])
    assert (resident_bytes() or 0) - (before or 0) < 50_000_000
    good = ChatTemplate({"default": tiny.TEMPLATE}, {})
    assert good.render(CONVERSATIONS[:1]) == ["<user>What is 2 + 3?<assistant>"]


def test_a_template_may_turn_hostile_later(monkeypatch):
    source = "{% if messages[0].content == 'now' %}" + HOSTILE["loops"] + "{% endif %}fine"
    template = ChatTemplate({"default": source}, {})
    assert template.render(CONVERSATIONS[:1]) == ["fine"]
    monkeypatch.setattr(chat._worker(), "time_limit_s", 0.3)
    with pytest.raises(ConfigError, match=r"within the limit of 0\.3 s"):
        template.render([[{"role": "user", "content": "now"}]])


def thinking_folder(place: Path) -> Path:
    folder = tiny.make_folder(place)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(
            {**json.loads(path.read_text()), "chat_template": f"{THINKING}{{{{ eos_token }}}}"}
        )
    )
    return folder


@pytest.mark.parametrize(("wish", "closed"), [("auto", False), ("on", False), ("off", True)])
def test_thinking_is_switched(tmp_path, wish, closed):
    tokenizer = load_tokenizer(thinking_folder(tmp_path / "model"), ModelConfig(thinking=wish))
    text = tokenizer.render(CONVERSATIONS[0])
    assert ("</think>" in text) == closed
    wanted = {} if wish == "auto" else {"enable_thinking": wish == "on"}
    assert text == tokenizer.inner._tokenizer.apply_chat_template(
        CONVERSATIONS[0], tokenize=False, add_generation_prompt=True, **wanted
    )
    assert text.endswith("<end>")


def test_thinking_that_cannot_be_switched_is_told(tiny_folder):
    assert thinking_switch({"default": "no"}, "auto") == {}
    with pytest.raises(ConfigError, match="no enable_thinking switch"):
        load_tokenizer(tiny_folder, ModelConfig(thinking="off"))


def test_a_folder_without_a_template_gets_plain_lines(tmp_path):
    folder = tiny.make_folder(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render(CONVERSATIONS[2]) == 'add\n\n{"sum": 3}\nand now?'
    with pytest.raises(ConfigError, match="no enable_thinking"):
        load_tokenizer(folder, ModelConfig(thinking="on"))
