"""A whole run on rows that differ: columns that some lack, messages and texts, begun turns."""

from __future__ import annotations

import json

from localrl import RunConfig, train
from localrl.runs.logs import read_jsonl

REWARD = '''
def checked(prompts, completions, answer, hint, level, **columns):
    """Fails if something is not as it was in the data."""
    for prompt, completion, gold, own in zip(prompts, completions, answer, level):
        n = int(gold)
        assert own == (n if n % 5 == 0 else None)
        if n % 2:
            assert prompt == f"{n} + 0 = ?" and isinstance(completion, str)
            continue
        assert [message["role"] for message in prompt] == ["user"]
        assert prompt[0]["name"] == "me"
        (turn,) = completion
        assert turn["content"].startswith("it is " if n % 4 == 0 else "")
    assert len(hint) == len(completions)
    return [float(len(str(completion)) % 2) for completion in completions]
'''


def row(n):
    asked = {"role": "user", "name": "me", "content": f"{n} + 0 = ?"}
    begun = [{"role": "assistant", "content": "it is "}] if n % 4 == 0 else []
    prompt = asked["content"] if n % 2 else [asked, *begun]
    level = {"level": n} if n % 5 == 0 else {}
    hint = {"hint": "only here"} if n == 7 else {}
    return {"prompt": prompt, "answer": str(n), **level, **hint}


def test_rewards_get_every_row_as_it_is(tiny_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(40)))
    (tmp_path / "r.py").write_text(REWARD)
    settings = {
        "model.path": str(tiny_folder),
        "task.name": str(tmp_path / "rows.jsonl"),
        "task.rewards": f"{tmp_path / 'r.py'}:checked",
        "task.eval_prompts": 6,
        "rollout.prompts_per_step": 12,
        "rollout.max_completion_tokens": 6,
        "run.steps": 2,
        "run.out": str(tmp_path / "run"),
    }
    folder = train(RunConfig.create(settings), progress=False).folder
    steps = [line for line in read_jsonl(folder / "metrics.jsonl") if "reward" in line]
    assert len(steps) == 2
    assert all(line["rewards/failures"] == 0 for line in steps)
    groups = list(read_jsonl(folder / "rollouts.jsonl"))
    begun = [group for group in groups if group["messages"][-1]["role"] == "assistant"]
    assert 0 < len(begun) < len(groups)
    assert all("name" in g["messages"][0] for g in begun)
