"""Which groups a report shows, and what it keeps of them."""

from __future__ import annotations

import json

from localrl.report.samples import GroupSampler, best_middle_worst, markup_free, sample, short


def lines(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").open()]


def grown(run_copy, times):
    """The run's groups again and again, under steps of their own."""
    with (run_copy / "rollouts.jsonl").open("a") as file:
        for time in range(times):
            for line in lines(run_copy)[:16]:
                file.write(json.dumps(line | {"step": 3 + time}) + "\n")
    return run_copy


def test_all_groups_where_they_fit(tree_run):
    sampled = sample(tree_run, 3_000_000)
    assert sampled.total == len(sampled.groups) == 16
    assert [group["step"] for group in sampled.groups] == [1] * 8 + [2] * 8
    assert sampled.has_pieces
    assert sum(sampled.reasons.values()) == 16


def test_a_group_keeps_its_numbers(tree_run):
    for line in lines(tree_run):
        group = short(line)
        for node, kept in zip(line["nodes"], group["nodes"], strict=True):
            assert kept["t"] == node["pieces"]
            assert kept["p"] == node["parent"]
            assert kept["n"] == len(kept["l"]) == len(node["token_ids"])
            assert all(
                abs(a + b) <= 5.1e-4
                for a, b in zip(kept["l"], node["sampled_logprobs"], strict=True)
            )
        assert [leaf["r"] for leaf in group["leaves"]] == [e["reward"] for e in line["leaves"]]


def test_pieces_join_to_the_text(tree_run):
    for line in lines(tree_run):
        for leaf in line["leaves"]:
            node, text = leaf["node"], ""
            while node >= 0:
                text = "".join(line["nodes"][node]["pieces"]) + text
                node = line["nodes"][node]["parent"]
            assert text.removesuffix("<end>") == leaf["text"]


def test_what_fits_is_spread_over_the_run(run_copy):
    folder = grown(run_copy, 14)
    whole = sample(folder, 100_000_000)
    assert len(whole.groups) == whole.total == 240
    size = len(markup_free(list(whole.groups)).encode())
    some = sample(folder, size // 8)
    assert some.total == 240
    assert 20 <= len(some.groups) <= 40
    assert len(markup_free(list(some.groups)).encode()) <= size // 8 + 2
    steps = {group["step"] for group in some.groups}
    assert all(steps & {step, step + 1, step + 2} for step in range(1, 15))
    rewards = [
        sum(leaf["reward"] for leaf in line["leaves"]) / len(line["leaves"])
        for line in lines(folder)
        if line["step"] == 16
    ]
    shown = [
        sum(leaf["r"] for leaf in group["leaves"]) / len(group["leaves"])
        for group in some.groups
        if group["step"] == 16
    ]
    assert {min(rewards), max(rewards)} <= set(shown)


def test_no_rollouts(run_copy):
    (run_copy / "rollouts.jsonl").unlink()
    assert sample(run_copy, 1000).groups == ()


def test_a_run_without_pieces_shows_ids_and_text(run_copy):
    old = lines(run_copy)[0]
    for node in old["nodes"]:
        del node["pieces"]
    (run_copy / "rollouts.jsonl").write_text(json.dumps(old) + "\n")
    sampled = sample(run_copy, 1_000_000)
    assert not sampled.has_pieces
    assert sampled.groups[0]["nodes"][0]["i"] == old["nodes"][0]["token_ids"]
    assert sampled.groups[0]["leaves"][0]["v"] == old["leaves"][0]["text"]


def test_long_ones_are_cut_and_say_so():
    ids = list(range(5000))
    node = {"parent": -1, "token_ids": ids, "sampled_logprobs": [0.0] * 5000}
    node |= {"entropies": [0.0] * 5000, "advantage": None, "pieces": ["x"] * 5000}
    line = {"step": 1, "messages": [{"role": "user", "content": "y" * 30_000}], "leaves": []}
    group = short(line | {"nodes": [node]})
    assert (group["nodes"][0]["n"], len(group["nodes"][0]["t"])) == (5000, 3000)
    assert group["messages"][0]["content"].endswith("y… (10000 more characters)")


def test_best_typical_and_worst():
    assert best_middle_worst([0.5, None, 1.0, 0.0]) == [("best", 2), ("typical", 0), ("worst", 3)]
    assert best_middle_worst([1.0, 1.0]) == [("best", 1)]
    assert best_middle_worst([None]) == []


def test_reasons(tree_run):
    found = sample(tree_run, 1000).reasons
    kept = sum(line["kept"] for line in lines(tree_run))
    assert found.get("learned from", 0) == kept
    assert sum(found.values()) == 16


def test_a_growing_run_is_followed_and_a_cut_one_read_again(run_copy):
    sampler, budget = GroupSampler(run_copy), 100_000_000
    assert sampler.sample(budget).total == 16
    grown(run_copy, 2)
    more = sampler.sample(budget)
    assert [group["step"] for group in more.groups] == [1] * 8 + [2] * 8 + [3] * 16 + [4] * 16
    path = run_copy / "rollouts.jsonl"
    again = [json.dumps(line | {"step": 9}) + "\n" for line in lines(run_copy)[16:24]]
    path.write_text("".join([*path.read_text().splitlines(keepends=True)[:16], *again]))
    assert [group["step"] for group in sampler.sample(budget).groups][16:] == [9] * 8


def test_no_markup_in_the_data():
    text = "</script><!--&amp;\u2028\ud800\x1b"
    assert not {"<", "&"} & set(markup_free([text]))
    assert json.loads(markup_free([text])) == [text]
