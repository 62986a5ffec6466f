"""`localrl chat` through a pipe, with real models."""

from __future__ import annotations

import pytest
import tiny
from click.testing import CliRunner

from localrl.backend import mx, tree_flatten
from localrl.cli.main import cli
from localrl.engines.open import make_policy
from localrl.export.adapters import adapter_of, write_adapter
from localrl.policy.model import load_model


def chat(*arguments, lines):
    return CliRunner().invoke(
        cli, ["chat", *map(str, arguments)], input="\n".join(lines) + "\n", catch_exceptions=False
    )


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """An adapter that says something else than its model."""
    policy = make_policy(
        load_model(tiny_folder), rank=4, scale=2.0, seed=0, for_cpu=True, dense=True
    )
    tiny.stir(policy.model, 0, 0.3)
    mx.eval([array for _, array in tree_flatten(policy.model.trainable_parameters())])
    folder = tmp_path_factory.mktemp("adapters") / "one"
    write_adapter(adapter_of(policy.model), folder)
    return folder


SAY = ("--temperature", 0, "--max-tokens", 8)


def test_the_embedded_model_answers_and_the_conversation_ends():
    done = chat(*SAY, "--max-tokens", 40, lines=["sum 12 78", "/quit", "sum 1 2"])
    assert done.exit_code == 0, done.output
    answers = done.stdout.splitlines()
    assert len(answers) == 1
    assert "#" in answers[0]


def test_adapter_and_base_take_turns(tiny_folder, adapter):
    with_both = chat(
        "--model", tiny_folder, "--adapter", adapter, *SAY,
        lines=["hello", "/reset", "/base", "hello", "/reset", "/adapter", "hello"],
    )  # fmt: skip
    alone = chat("--model", tiny_folder, *SAY, lines=["hello"])
    assert with_both.exit_code == alone.exit_code == 0
    first, base, again = with_both.stdout.split("\n")[:3]
    assert first == again != base
    assert base == alone.stdout.split("\n")[0]


def test_what_was_said_is_heard_until_it_is_reset(tiny_folder):
    lines = ["one", "two", "/reset", "two"]
    done = chat("--model", tiny_folder, *SAY, lines=lines)
    _, later, fresh = done.stdout.split("\n")[:3]
    assert later != fresh
    system = chat("--model", tiny_folder, *SAY, "--system", "be brief", lines=["two"])
    assert system.stdout.split("\n")[0] != fresh


def test_a_seed_gives_the_same_again(tiny_folder):
    def say(seed):
        options = ("--model", tiny_folder, "--max-tokens", 12, "--seed", seed)
        return chat(*options, lines=["hello"]).stdout

    assert say(1) == say(1) != say(2)


def test_the_temperature_is_that_of_training_unless_it_is_said(tiny_folder):
    def header(*options):
        return chat("--model", tiny_folder, *options, lines=["/quit"]).stderr.splitlines()[0]

    assert ", temperature 1. /base" in header()
    assert ", temperature 0.4. /base" in header("--set", "rollout.temperature=0.4")
    assert ", greedy. /base" in header("--temperature", 0)


def test_commands_that_are_none_and_adapters_that_are_missing():
    done = chat(*SAY, lines=["", "/adapter", "/\x1b[31mwhat", "É"])
    assert done.exit_code == 0
    assert done.stdout == ""
    assert "There is no adapter" in done.stderr
    assert "Unknown command /\ufffd[31mwhat" in done.stderr
    assert "no token for 'É'" in done.stderr


def test_control_characters_of_an_answer_do_not_reach_the_terminal(tmp_path):
    # Half of the vocabulary drives a terminal, so that a random model soon says so.
    extra = ["\x1b[31m", "\x07", "\u202e", *(chr(c) for c in range(0x80, 0x90))]
    folder = tiny.make_folder(tmp_path / "model", extra=extra)
    options = ("--model", folder, "--max-tokens", 200, "--temperature", 5, "--seed", 0)
    done = chat(*options, lines=["hello"])
    assert "\ufffd" in done.stdout
    assert not {"\x1b", "\x07", "\u202e", "\x85"} & set(done.stdout)
