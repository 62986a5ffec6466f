"""Rewards by a judge, in the reward process, against a real server that answers well or badly."""

from __future__ import annotations

import inspect
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from judges import Answer, completion, judge_server
from waiting import DEADLINE_S

from localrl.config import RunConfig
from localrl.errors import ConfigError, RewardError, Stopped
from localrl.processes.worker import Worker
from localrl.records import Example, Group, Leaf, Node
from localrl.report.reading import read_run
from localrl.report.terminal import samples
from localrl.rewards import chat_client
from localrl.rewards.catalog import parse_rewards
from localrl.rewards.chat_client import KEY_VARIABLE, NoAnswer, find_server, read_url
from localrl.rewards.judge import get_judge_rank_reward, get_judge_reward
from localrl.rewards.scoring import Scorer
from localrl.runs.logs import read_jsonl
from localrl.settings import TaskConfig
from localrl.train import train


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(time_limit_s=DEADLINE_S, memory_limit_bytes=None) as worker:
        yield worker


@pytest.fixture
def hurry(monkeypatch):
    """Attempts in this process come without pauses."""
    monkeypatch.setattr(chat_client, "PAUSES_S", (0.0, 0.0))


def group(texts: list[str], *, name: str = "x", answer: Any = None, **columns: Any) -> Group:
    one = Node(-1, np.ones(1, np.int32), np.ones(1, bool), np.zeros(1), np.zeros(1))
    return Group(
        example=Example(name, ({"role": "user", "content": f"do {name}"},), answer, columns),
        prompt_ids=(9,),
        nodes=(one,) * len(texts),
        leaves=tuple(Leaf(i, "stop", text) for i, text in enumerate(texts)),
        planned_roots=len(texts),
    )


def scorer(worker: Worker, server: Any, text: str = "judge", **settings: Any) -> Scorer:
    """A scorer with one judge, named as in a run's settings."""
    told: list[str] = []
    config = TaskConfig(judge_url=server.url, **settings)
    made = Scorer(parse_rewards([text], None, config.reward_settings), worker, told.append)
    made.told = told  # type: ignore[attr-defined]
    return made


def length(question: str) -> str:
    """Judge by the number of letters x in the answer."""
    return f"I count.\nScore: {question.partition('The answer:')[2].count('x')}"


def test_completions_get_the_judge_s_scores_and_its_texts_are_logged(worker):
    with judge_server(length) as server:
        scoring = scorer(worker, server)
        groups = [group(["xxx", "", "x"], answer="xx"), group(["xxxxxxxxxx"], name="y")]
        scored = scoring.score(groups)
        assert [s.rewards for s in scored] == [(0.5, 0.2, 0.3), (1.0,)]
        logged = scoring.take_logs().of(groups[1])
    assert logged == [{"judge": "I count.\nScore: 10"}]
    [without] = [text for text in server.questions if "do y" in text]
    with_gold = next(text for text in server.questions if "do x" in text)
    assert "The task:\ndo x\n" in with_gold
    assert "A correct answer, for comparison:\nxx" in with_gold
    assert "comparison" not in without
    assert without.endswith("Score: <number>")
    assert server.asked[0]["model"] == "judge-1"
    assert server.asked[0]["temperature"] == 0


def test_a_question_is_asked_once_and_several_are_in_flight(worker):
    with judge_server(length) as server:
        server.pause_s = 0.05
        scoring = scorer(worker, server, judge_parallel=8)
        texts = ["x" * (i % 8) for i in range(32)]
        assert scoring.score([group(texts)])[0].rewards == tuple((i % 8) / 10 for i in range(32))
        assert len(server.asked) == 8
        assert server.most_together > 1
        scoring.score([group(texts[:8])])
        assert len(server.asked) == 8
        assert scoring.score([group(["x"], name="other")])[0].rewards == (0.1,)
        assert len(server.asked) == 9


BAD_BODIES = {
    "empty body": b"",
    "no JSON": b"Score: 7",
    "HTML": b"<html>Score: 7</html>",
    "half of it": completion("Score: 7")[:-3],
    "no UTF-8": b'{"choices": "\xff\xfe"}',
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "no choices": b'{"object": "chat.completion"}',
    "empty choices": b'{"choices": []}',
    "two choices": json.dumps({"choices": [{"message": {"content": "7"}}] * 2}).encode(),
    "a choice that is text": b'{"choices": ["Score: 7"]}',
    "no message": b'{"choices": [{"text": "Score: 7"}]}',
    "content null": completion(None),
    "content a number": completion(7),
    "content in parts": completion([{"type": "text", "text": "Score: 7"}]),
    "blank content": completion(" \n"),
    "cut off": completion("Score: 7", finish_reason="length"),
    "an error with status 200": b'{"error": {"message": "model is loading"}}',
    "deep nesting": b"[" * 100_000,
    "redirect": (302, b"Score: 7"),
    "unknown model": (404, b'{"error": {"message": "model \\"judge-1\\" not found"}}'),
    "not allowed": (401, b"who are you"),
    "no verdict": "I like it.",
    "out of range": "Score: 11",
    "two numbers": "Score: 7 or 8",
    "verdict in the middle": "Score: 7\nAnything else?",
    "a nonbreaking mess": "Score:\u00a07\u2028\u0000",
}


@pytest.mark.parametrize("kind", BAD_BODIES)
def test_a_malformed_answer_is_no_reward(kind, hurry):
    """None is read as a number, and the others of the step are scored all the same."""
    bad = BAD_BODIES[kind]
    with judge_server(lambda text: bad if "BAD" in text else "Score: 5") as server:
        reward = get_judge_reward(url=server.url, parallel=1)
        said: dict[str, list[Any]] = {}
        values = reward(
            prompts=["p"] * 3, completions=["one", "BAD", "two"], log_extra=said.__setitem__
        )
        assert values[::2] == [0.5, 0.5]
        assert isinstance(values[1], str)
        assert values[1].startswith("the judge gave no ")
        assert said["judge"][1]
        assert len(server.asked) == 3  # none of these is worth another attempt


def test_the_reason_reaches_the_person_and_the_run_ends_when_it_happens_too_often(worker):
    with judge_server(lambda text: "no \x1b[31mverdict" if "BAD" in text else "5") as server:
        scoring = scorer(worker, server, judge_model="m")
        assert scoring.score([group(["a", "BAD", "b", "BAD"])])[0].rewards == (0.5, None, 0.5, None)
        [line] = scoring.told  # type: ignore[attr-defined]
        assert "no verdict: its last line is 'no \\x1b[31mverdict', not a score alone" in line
        assert "2 of 4 completions get no reward" in line
        with pytest.raises(RewardError, match="its last line is"):
            _ = [scoring.score([group([f"a{i}", f"BAD{i}"])]) for i in range(20)]


def test_a_server_that_is_busy_is_asked_again(hurry):
    replies = iter([(503, b"loading"), (429, b"slow down"), "Score: 10"])
    with judge_server(lambda text: next(replies)) as server:
        assert get_judge_reward(url=server.url)(prompts=["p"], completions=["c"]) == [1.0]
    with judge_server(lambda text: (500, b'{"error": "out of memory"}')) as server:
        [said] = get_judge_reward(url=server.url)(prompts=["p"], completions=["c"])
        assert said.endswith("HTTP 500 out of memory")
        assert len(server.asked) == 3


def test_a_server_that_is_gone_costs_a_few_requests_and_can_come_back(hurry):
    """The first completions keep their rewards; of the rest each has none, without a wait."""
    texts = [f"t{i}" for i in range(40)]
    with judge_server(lambda text: "Score: 5") as server:
        reward = get_judge_reward(url=server.url, parallel=2)
        assert reward(prompts=["p"] * 3, completions=texts[:3]) == [0.5] * 3
    values = reward(prompts=["p"] * 40, completions=texts)
    assert values[:3] == [0.5] * 3
    refused = sum("Connection refused" in said for said in values[3:])
    assert 2 <= refused <= 3  # one may have been begun before the second was given up
    assert sum("has stopped answering" in said for said in values[3:]) == 37 - refused
    with judge_server(lambda text: "Score: 10", port=server.server_address[1]):
        assert reward(prompts=["p"] * 40, completions=texts) == [0.5] * 3 + [1.0] * 37


def test_a_server_that_is_silent_is_given_up_too():
    awake = threading.Event()
    with judge_server(lambda text: awake.wait(DEADLINE_S) and "Score: 5") as server:
        reward = get_judge_reward(url=server.url, model="m", parallel=2, timeout_s=0.2)
        values = reward(prompts=["p"] * 20, completions=[f"t{i}" for i in range(20)])
        silent = sum("did not answer within 0.2 s" in said for said in values)
        assert 2 <= silent <= 3
        assert sum("has stopped answering" in said for said in values) == 20 - silent
        awake.set()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as place:
        return place.getsockname()[1]


@pytest.mark.parametrize(
    ("drips", "limit_s", "why"),
    [(False, DEADLINE_S, "closed in the middle"), (True, 0.3, "did not answer within 0.3 s")],
)
def test_an_answer_that_breaks_off_or_trickles_is_none(drips, limit_s, why, hurry):
    with judge_server(length) as server:
        server.missing, server.drips = 5000, drips
        reward = get_judge_reward(url=server.url, model="m", timeout_s=limit_s)
        [said] = reward(prompts=["p"], completions=["c"])
        assert why in said


def test_nothing_is_contacted_before_the_first_question(worker):
    with judge_server(length) as server:
        scorer(worker, server).check(["answer"])
        get_judge_reward(url=server.url)(prompts=[], completions=[])
        assert server.asked == []


def test_only_the_named_host_is_contacted(monkeypatch):
    """A proxy of the environment is not, which would see prompts and completions."""
    with judge_server(length) as server, judge_server(length) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert get_judge_reward(url=server.url)(prompts=["p"], completions=["x"]) == [0.1]
        assert (len(server.asked), len(proxy.asked)) == (1, 0)


def test_the_local_programs_are_tried_in_turn(monkeypatch):
    with judge_server(length, ("qwen3:4b",)) as server:
        dead = f"http://127.0.0.1:{closed_port()}/v1"
        monkeypatch.setattr(chat_client, "LOCAL", {"Ollama": dead, "LM Studio": server.url})
        found, model = find_server(None, None, 5.0)
        assert (found.url, model) == (server.url, "qwen3:4b")
        assert find_server(None, "other", 5.0)[1] == "other"
        server.models = ("a", "b")
        with pytest.raises(NoAnswer, match=r"has 2 models \(a, b\). Name one: task.judge_model"):
            find_server(None, None, 5.0)
        monkeypatch.setattr(chat_client, "LOCAL", {"Ollama": dead, "LM Studio": dead})
        with pytest.raises(NoAnswer, match="neither Ollama nor LM Studio answers"):
            find_server(None, "m", 5.0)
    assert chat_client.LOCAL != {}
    for url in vars(chat_client)["LOCAL"].values():
        assert url.startswith("http://127.0.0.1:")


def test_addresses(monkeypatch):
    assert read_url("http://127.0.0.1:8080/v1/") == "http://127.0.0.1:8080/v1"
    for wrong in ("127.0.0.1:8080", "ftp://x/v1", "http://", "http://u:p@x/v1", "http://x/v1?k=1",
                  "file:///etc/passwd", "http://x:99999/v1", "http://[::1/v1"):  # fmt: skip
        with pytest.raises(ValueError, match="url is"):
            read_url(wrong)
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert read_url("https://judge.example/v1")
    assert read_url("http://localhost:1234/v1")
    with pytest.raises(ValueError, match="only sent over https"):
        read_url("http://judge.example/v1")
    with judge_server(length) as server:
        get_judge_reward(url=server.url)(prompts=["p"], completions=["c"])
        assert server.headers[0]["Authorization"] == "Bearer secret"
        monkeypatch.delenv(KEY_VARIABLE)
        get_judge_reward(url=server.url)(prompts=["p"], completions=["d"])
        assert "Authorization" not in server.headers[1]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"judge_scale": "ten"}, "scale is 'ten'"),
        ({"judge_url": "localhost:1234"}, "url is 'localhost:1234'"),
        ({"judge_prompt": "Is {prompt} solved?"}, "has no place {completion}"),
        ({"judge_prompt": "missing.txt"}, "'missing.txt' cannot be read"),
        ({"judge_prompt": "{completion} for {grade}"}, "needs the column 'grade'"),
    ],
)
def test_settings_that_cannot_work_are_found_before_the_run(worker, settings, why):
    specs = parse_rewards(["judge"], None, TaskConfig(**settings).reward_settings)
    with pytest.raises(ConfigError) as refused:
        Scorer(specs, worker).check(["level"])
    assert why in str(refused.value)


def test_a_template_names_columns_and_is_filled_once(worker, tmp_path):
    file = tmp_path / "judge.txt"
    file.write_text('Rubric {rubric} as {"json": 1}\nA: {completion}\nGold {answer}\n')
    for prompt in (str(file), file.read_text()):
        with judge_server(lambda text: "Score: yes") as server:
            scoring = scorer(worker, server, judge_prompt=prompt, judge_scale="yes=2, no=-1")
            scoring.check(["rubric", "answer"])
            groups = [
                group(["say {answer} {rubric}"], answer="42", rubric=["short", "é"]),
                group(["no gold"], rubric=[]),
            ]
            scored = scoring.score(groups)
            assert [s.rewards for s in scored] == [(2.0,), (None,)]
            assert scoring.counts["judge_reward"].failures == 0
        [question] = server.questions
        head = 'Rubric ["short", "é"] as {"json": 1}\nA: say {answer} {rubric}\nGold 42\n'
        assert question.startswith(head)


def test_a_conversation_is_shown_with_its_roles_and_calls():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2?"}]
    with judge_server(lambda text: "5") as server:
        get_judge_reward(url=server.url)(prompts=[asked], completions=[said])
    [question] = server.questions
    assert "system: Be brief.\n\nuser: 1+2?" in question
    assert 'assistant: [{"type": "function"' in question
    assert "tool: 3\n\nassistant: It is 3." in question


def rank_by_length(question: str) -> str:
    answers = question.partition("Answer 1:")[2].partition("\nRank the")[0]
    sizes = [len(part.strip()) for part in ("1:" + answers).split("Answer ")]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return f"Longer is better.\nRanking: {' > '.join(str(i + 1) for i in order)}"


def test_a_group_is_ranked_in_one_question(worker):
    with judge_server(rank_by_length) as server:
        scoring = scorer(worker, server, "judge_rank")
        groups = [
            group(["aaaa", "a", "aa", "a"]),
            group(["b", "bb"], name="y"),
            group(["same", "same"], name="z"),
            group(["alone"], name="w"),
        ]
        scored = scoring.score(groups)
        assert [s.rewards for s in scored] == [
            (1.0, 0.0, 0.5, 0.0),
            (0.0, 1.0),
            (0.5, 0.5),
            (None,),
        ]
        assert len(server.asked) == 2
        assert scoring.counts["judge_rank_reward"].failures == 0
        logs = scoring.take_logs()
    assert logs.of(groups[0])[0]["judge_rank"].startswith("Longer is better.")
    assert logs.of(groups[2])[0] == {"judge_rank": None}


def test_places_in_a_ranking_do_not_follow_the_order_of_the_completions():
    """A judge that always prefers the first answer shown would else reward a place, not a text."""
    reward_of_first = []
    with judge_server(lambda text: "Ranking: 1 > 2 > 3 > 4") as server:
        reward = get_judge_rank_reward(url=server.url)
        for i in range(30):
            values = reward(prompts=[f"p{i}"] * 4, completions=[f"{i}{c}" for c in "abcd"])
            assert sorted(values) == [0.0, 1 / 3, 2 / 3, 1.0]
            reward_of_first.append(values[0])
    assert 0.2 < np.mean(reward_of_first) < 0.8


def test_a_ranking_that_cannot_be_read_is_none_for_its_group_alone():
    def answer(question: str) -> str:
        return "Ranking: 1 > 2 > 3" if "BAD" in question else "Ranking: 1 > 2"

    with judge_server(answer) as server:
        reward = get_judge_rank_reward(url=server.url)
        values = reward(prompts=["p", "p", "q", "q"], completions=["a", "BAD", "a", "b"])
    assert all("does not name each of 2 answers once" in said for said in values[:2])
    assert sorted(values[2:]) == [0.0, 1.0]


def test_a_long_call_shows_life_and_can_be_stopped(worker):
    """The limit of a reward call is for its own work; a judge's is for each completion."""
    beats = 0

    def beat(work: Any) -> None:
        nonlocal beats
        beats += 1
        if beats > 5:
            raise Stopped("asked to")

    with judge_server(length) as server, Worker(time_limit_s=0.01, memory_limit_bytes=None) as own:
        server.pause_s = DEADLINE_S
        config = TaskConfig(judge_url=server.url, judge_model="m")
        specs = parse_rewards(["judge"], None, config.reward_settings)
        with pytest.raises(Stopped):
            Scorer(specs, own, beat=beat).score([group(["x"])])


SMALL = {
    "rollout.prompts_per_step": 2,
    "rollout.group_size": 2,
    "rollout.max_completion_tokens": 4,
    "task.eval_prompts": 2,
    "run.steps": 4,
    "model.engine": "cpu",
}


def test_a_run_goes_on_when_its_judge_fails_for_a_step(tiny_folder, tmp_path):
    def answer(question: str) -> Answer:
        if 3 <= len(server.asked) <= 6:  # after two of the first evaluation
            return 404, b'{"error": "model was unloaded"}'
        return f"Well.\nScore: {len(question) % 11}"

    out = tmp_path / "run"
    with judge_server(answer, ("small",)) as server:
        settings = {
            **SMALL,
            "model.path": str(tiny_folder),
            "task.name": "sums",
            "task.rewards": ["judge"],
            "task.judge_url": server.url,
            "task.judge_timeout_s": DEADLINE_S,
            "run.out": str(out),
        }
        train(RunConfig.create(settings))
    steps = [line for line in read_jsonl(out / "metrics.jsonl") if "reward" in line]
    assert len(steps) == 4
    assert any(line["reward"] is None for line in steps)
    assert steps[-1]["reward"] is not None
    leaves = [leaf for line in read_jsonl(out / "rollouts.jsonl") for leaf in line["leaves"]]
    assert {type(leaf["reward"]) for leaf in leaves} == {float, type(None)}
    for leaf in leaves:
        said = leaf["extra"]["judge"]
        assert said.startswith("Well.\nScore: " if leaf["reward"] is not None else server.url)
    shown = "".join(samples(read_run(out)))
    assert "[judge] Well.\n      Score: " in shown
    assert f"[judge] {server.url}: HTTP 404 model was unloaded" in shown
    [event] = [e for e in read_jsonl(out / "events.jsonl") if e["kind"] == "judges"]
    assert event["found"] == [f"judge_reward asks small at {server.url}"]


def test_a_run_without_its_judge_does_not_begin(tiny_folder, tmp_path):
    url = f"http://127.0.0.1:{closed_port()}/v1"
    for name in ("judge", "judge_rank"):
        settings = {
            **SMALL,
            "model.path": str(tiny_folder),
            "task.rewards": [name],
            "task.judge_url": url,
            "task.judge_model": "m",
            "run.out": str(tmp_path / "run"),
        }
        with pytest.raises(RewardError, match=r"has no judge: .* refused"):
            train(RunConfig.create(settings))
    assert not (tmp_path / "run").exists()


def test_settings_of_a_run_have_the_rewards_defaults():
    config = TaskConfig()
    assert config.reward_settings == {"judge": {}, "judge_rank": {}}
    for make in (get_judge_reward, get_judge_rank_reward):
        defaults = {name: p.default for name, p in inspect.signature(make).parameters.items()}
        del defaults["name"]
        assert all(getattr(config, f"judge_{name}") == value for name, value in defaults.items())
    changed = TaskConfig(judge_scale="1-5", judge_parallel=9)
    [spec] = parse_rewards(["judge(parallel=2)"], None, changed.reward_settings)
    assert spec.target == "localrl.rewards.judge:get_judge_reward(parallel=2, scale='1-5')"
    [spec] = parse_rewards(["judge_rank"], None, changed.reward_settings)
    assert spec.target == "localrl.rewards.judge:get_judge_rank_reward(parallel=9)"
