"""What a plan gives up, and in which order: with costs worked by hand, and with real estimates."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

import pytest

from localrl.config import RunConfig
from localrl.engines.memory import engines_for
from localrl.engines.mlx.memory import HEAD_MOST
from localrl.errors import MemoryBudgetError
from localrl.memory.estimate import OTHER, PRIORS, Coefficients, Estimate, Workload
from localrl.memory.known_models import find_known
from localrl.memory.limit import Limit, parse_limit
from localrl.memory.machine import Machine, mac
from localrl.memory.plan import (
    CACHED_ON_CPU,
    LEAST_CHUNK,
    LEAST_LENGTH,
    LOGIT_BYTES,
    PRIOR_SHARE,
    PlanRequest,
    cache_bytes,
    changes,
    fit,
    initial_plan,
    refit,
)
from localrl.memory.sizes import read_sizes
from localrl.records import MemoryPlan
from localrl.training.memory_plan import plan_request

MIB = 2**20
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 8000,
    "tie_word_embeddings": True,
    "quantization": {"bits": 4, "group_size": 64},
}
HOST = Machine("Linux", "cpu", total_bytes=10**15, available_bytes=10**15)
IN_MLX = {"model.engine": "mlx"}
"""What it takes is not counted, but measured."""
TREE = {"rollout.strategy": "tree", "rollout.group_size": 8}


def request(limit=None, model=None, machine=HOST, **settings) -> PlanRequest:
    """What a run on that model asks, under a limit of so many bytes; None: the machine's own."""
    config = RunConfig.create({"model.path": "m", **settings})
    made = plan_request(config, read_sizes(model or CONFIG), machine)
    return replace(made, limit=Limit(limit, "a test", from_machine=False)) if limit else made


def want(**settings) -> MemoryPlan:
    config = RunConfig.create({"model.path": "m", **settings})
    return initial_plan(config, vocabulary=1000, on_cpu=True, threads=2)


def test_sizes_that_were_asked_for_are_kept():
    made = want(**{"memory.decode_rows": 3, "memory.micro_rows": 2, "memory.head_chunk": 7})
    assert (made.decode_rows, made.micro_rows, made.head_chunk) == (3, 2, 7)
    assert (made.group_size, made.max_completion_tokens) == (2, 256)
    assert not made.grad_checkpoint


def test_the_others_are_chosen():
    made = want(**{"rollout.prompts_per_step": 4, "rollout.group_size": 6})
    assert (made.decode_rows, made.prefill_rows) == (24, 24)
    assert made.micro_rows == 12  # 4,096 tokens, with a sixth of a prompt of 512 to each 256


def test_they_are_not_more_than_there_is():
    """So that the first step down changes something."""
    short = {"rollout.prompts_per_step": 1, "rollout.max_prompt_tokens": 10}
    made = want(**short, **{"rollout.max_completion_tokens": 10})
    assert (made.decode_rows, made.micro_rows, made.head_chunk) == (2, 2, 20)


@pytest.mark.parametrize(
    ("wish", "on_cpu", "dense"),
    [("auto", True, True), ("auto", False, False), ("on", False, True), ("off", True, False)],
)
def test_the_base_is_dequantised_on_the_cpu_or_where_it_is_wished(wish, on_cpu, dense):
    config = RunConfig.create({"model.path": "m", "memory.dequantise": wish})
    assert initial_plan(config, vocabulary=9, on_cpu=on_cpu, threads=None).dequantise is dense


def test_adapters_are_kept_only_as_the_reference_of_a_kl():
    given = {"lora.adapter": "a", "learning.kl_coef": 0.1}
    assert request(**given).workloads[2].reference
    assert not request(**{"lora.adapter": "a"}).workloads[2].reference
    assert not request(**{"learning.kl_coef": 0.1}).workloads[2].reference
    config = RunConfig.create({"model.path": "m", **given})
    evaluates = plan_request(config, read_sizes(CONFIG), HOST, trains=False)
    assert not evaluates.workloads[2].reference


def test_logits_stay_below_a_constant_as_the_vocabulary_grows():
    for vocabulary in (100, 1000, 32_000, 151_936, 262_144, 1_000_000, 4_000_000):
        made = request(model=CONFIG | {"vocab_size": vocabulary})
        targets = made.plan.micro_rows * 256
        assert made.plan.head_chunk == max(1, min(targets, LOGIT_BYTES // (4 * vocabulary)))
        assert made.estimate(made.plan).head <= HEAD_MOST * LOGIT_BYTES
    # One row is the least there is.
    assert request(model=CONFIG | {"vocab_size": 10_000_000}).plan.head_chunk == 1


@dataclass(frozen=True)
class ByHand(PlanRequest):
    """Costs that can be worked by hand, in MiB: `a` always, and by what the plan has."""

    micro: int = 0
    chunk: int = 0
    prefill: int = 0
    decode: float = 0

    def estimate(self, plan: MemoryPlan, coefficients: Coefficients = PRIORS) -> Estimate:
        length = plan.max_completion_tokens / 64
        recomputed = 4 if plan.grad_checkpoint else 1
        return Estimate(
            weights=(48 if plan.dequantise else 8) * MIB,
            adapters=2 * MIB - OTHER,
            loading=0,
            prompts=plan.prefill_rows * self.prefill * MIB,
            caches=round(plan.decode_rows * self.decode * length * MIB),
            drawing=0,
            linear=round(plan.micro_rows * self.micro / recomputed * MIB),
            quadratic=0,
            head=plan.head_chunk * self.chunk * MIB,
            gradients=0,
            optimizer=0,
        )


def by_hand(room: float, *, dense=False, may_checkpoint=True, tree=False, **costs) -> ByHand:
    """A run that may take `room` MiB, and wants 16 rows decoded, 8 in the update, chunks of 32."""
    plan = replace(
        want(), group_size=8, decode_rows=16, prefill_rows=16, micro_rows=8, head_chunk=32,
        max_completion_tokens=64, dequantise=dense,
    )  # fmt: skip
    engines = engines_for("mlx", device="cpu")  # whose costs are not counted
    workloads = {
        n: Workload(2, 0, n, tree, False, 4, 0, (), 4, engines)
        for n in ((8, 4, 2) if tree else (8,))
    }
    limit = Limit(round(room * MIB / PRIOR_SHARE) + 1, "a test", from_machine=False)
    return ByHand(plan, read_sizes(CONFIG), workloads, limit, may_checkpoint, **costs)


# 10 + 8 for a row (2 where blocks are recomputed) + 1 for a position of a chunk.
@pytest.mark.parametrize(
    ("room", "micro_rows", "head_chunk", "grad_checkpoint"),
    [
        (106, 8, 32, False),
        (105, 7, 32, False),
        (50, 1, 32, False),
        (49, 1, 31, False),
        (34, 1, 16, False),
        (33, 3, 17, True),  # recomputing gives room for two rows more, and for one position
        (28, 1, 16, True),
    ],
)
def test_the_update_gives_up_rows_then_the_chunk_then_keeps_less(
    room, micro_rows, head_chunk, grad_checkpoint
):
    found = fit(by_hand(room, micro=8, chunk=1))
    assert (found.micro_rows, found.head_chunk) == (micro_rows, head_chunk)
    assert found.grad_checkpoint is grad_checkpoint
    # What would not help is not touched.
    assert (found.decode_rows, found.prefill_rows, found.max_completion_tokens) == (16, 16, 64)


def test_blocks_are_not_recomputed_where_they_cannot_be():
    assert not fit(by_hand(34, micro=8, chunk=1, may_checkpoint=False)).grad_checkpoint
    with pytest.raises(MemoryBudgetError):
        fit(by_hand(33, micro=8, chunk=1, may_checkpoint=False))


# 10 + 1 for a prompt + 4 for a row.
@pytest.mark.parametrize(
    ("room", "prefill_rows", "decode_rows"),
    [(90, 16, 16), (89, 15, 16), (75, 1, 16), (74, 4, 15), (15, 1, 1)],
)
def test_rollouts_give_up_prompts_prefilled_then_rows(room, prefill_rows, decode_rows):
    found = fit(by_hand(room, prefill=1, decode=4))
    assert (found.prefill_rows, found.decode_rows) == (prefill_rows, decode_rows)
    assert (found.micro_rows, found.head_chunk, found.grad_checkpoint) == (8, 32, False)


# 50, or 10 as it is packed, + 4 for a row of 64 tokens; a tree has as many rows as its group.
@pytest.mark.parametrize(
    ("room", "decode_rows", "dense", "group_size", "length"),
    [
        (114, 16, True, 8, 64),
        (82, 8, True, 8, 64),
        (81, 16, False, 8, 64),
        (42, 8, False, 8, 64),
        (41, 7, False, 4, 64),
        (26, 4, False, 4, 64),
        (25, 3, False, 2, 64),
        (18, 2, False, 2, 64),
        (17, 2, False, 2, 48),  # lengths fall by 16
        (12, 2, False, 2, 16),
    ],
)
def test_then_the_dense_base_then_the_group_then_the_length(
    room, decode_rows, dense, group_size, length
):
    found = fit(by_hand(room, decode=4, dense=True, tree=True))
    assert (found.decode_rows, found.dequantise) == (decode_rows, dense)
    assert (found.group_size, found.max_completion_tokens) == (group_size, length)
    assert (found.micro_rows, found.head_chunk, found.prefill_rows) == (8, 32, 16)


def test_a_refusal_names_a_limit_that_does():
    short = by_hand(11, decode=4, dense=True, tree=True)
    with pytest.raises(
        MemoryBudgetError, match=r"13 MB are predicted, 8 MB of them for the weights"
    ) as it:
        fit(short)
    assert it.value.exit_code == 3
    named = named_limit(it.value)
    assert named == -(-12 * MIB // PRIOR_SHARE // 10**6) * 10**6
    found = fit(replace(short, limit=Limit(named, "a test", from_machine=False)))
    assert found.max_completion_tokens == 16


def named_limit(error: MemoryBudgetError) -> int:
    told = re.search(r"--memory-limit (\w+)", str(error))
    assert told
    return int(parse_limit(told[1]))


def test_the_reason_says_what_was_given_up():
    reason = fit(by_hand(41, decode=4, dense=True, tree=True)).reason
    assert "changed to fit: group_size 8 -> 4, decode_rows 16 -> 7, dequantise off" in reason
    assert "from priors; limit 57 MB (a test)" in reason
    assert "changed to fit" not in fit(by_hand(114, decode=4, dense=True, tree=True)).reason


def draw_case(draws: random.Random) -> PlanRequest:
    """A run on a model, both drawn at random."""
    heads = draws.choice([2, 4, 8])
    model = CONFIG | {
        "model_type": draws.choice(["qwen3", "llama"]),
        "hidden_size": 64 * draws.randint(1, 8),
        "num_hidden_layers": draws.randint(1, 4),
        "intermediate_size": 64 * draws.randint(1, 24),
        "num_attention_heads": heads,
        "num_key_value_heads": draws.choice([1, heads]),
        "vocab_size": draws.choice([64, 5000, 150_000]),
        "tie_word_embeddings": draws.random() < 0.5,
    }
    if draws.random() < 0.3:
        del model["quantization"]
    strategy = draws.choice(["flat", "tree", "adaptive"])
    settings = {
        "rollout.strategy": strategy,
        "rollout.group_size": draws.choice([2, 4, 8, 16]),
        "rollout.prompts_per_step": draws.randint(1, 16),
        "rollout.max_prompt_tokens": draws.choice([16, 100, 512]),
        "rollout.max_completion_tokens": draws.choice([8, 32, 300, 1024]),
        "task.eval_prompts": draws.choice([0, 10, 256]),
    }
    machine = replace(HOST, device=draws.choice(["cpu", "cuda"]))
    return request(model=model, machine=machine, **settings)


def under(found: PlanRequest, limit: float) -> PlanRequest:
    return replace(found, limit=Limit(int(limit), "a test", from_machine=False))


ROWS = ("decode_rows", "prefill_rows", "micro_rows", "head_chunk")


@pytest.mark.parametrize("seed", range(24))
def test_whatever_is_asked_a_plan_keeps_to_its_allowance(seed):
    """Or its refusal names a limit that does; and more memory never leads to less."""
    wish = draw_case(random.Random(seed))
    whole = wish.needed(wish.plan)
    best = None
    for share in (1.01, 0.9, 0.7, 0.5, 0.35, 0.25, 0.15, 0.08, 0.04):
        limit = share * whole
        try:
            found = fit(under(wish, limit))
        except MemoryBudgetError as error:
            limit = named_limit(error)
            assert limit > share * whole
            found = fit(under(wish, limit))
        assert found.predicted_bytes == wish.estimate(found).peak
        assert found.predicted_bytes <= wish.share(found, PRIORS) * limit
        assert found.group_size in wish.workloads
        assert all(1 <= getattr(found, row) <= getattr(wish.plan, row) for row in ROWS)
        assert found.max_completion_tokens >= min(LEAST_LENGTH, wish.plan.max_completion_tokens)
        if share > 1:
            assert changes(wish.plan, found) == {}
        worth = (found.max_completion_tokens, found.group_size, found.dequantise,
                 not found.grad_checkpoint)  # fmt: skip
        assert best is None or worth <= best or limit > share * whole
        best = worth


def test_flat_groups_are_never_made_smaller_for_the_update():
    """Their completions are scored a few at a time anyhow."""
    wish = request(**{"rollout.group_size": 8})
    whole = wish.estimate(wish.plan).peak
    for share in (1.2, 0.8, 0.5, 0.3):
        found = fit(under(wish, share * whole))
        assert found.group_size == 8


def test_where_no_limit_is_known_nothing_is_unpacked_unasked():
    blind = replace(HOST, total_bytes=None, available_bytes=None)
    found = fit(request(machine=blind))
    assert found.limit_bytes is None
    assert "available memory cannot be read" in found.reason
    assert not found.dequantise
    assert found.predicted_bytes == request().estimate(found).peak
    dense = request(machine=blind, model={k: v for k, v in CONFIG.items() if k != "quantization"})
    assert changes(dense.plan, fit(dense)) == {}


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_measurements_change_rows_alone(factor):
    coefficients = Coefficients(factor, factor, measured=True)
    for settings in (TREE, {}):
        wish = request(**settings, **IN_MLX)
        whole = wish.needed(wish.plan)
        for share in (1.0, 0.7, 0.5):
            before = fit(under(wish, share * whole))
            try:
                after = refit(under(wish, share * whole), before, coefficients)
            except MemoryBudgetError:
                assert factor > 1
                continue
            assert changes(before, after).keys() <= {*ROWS, "grad_checkpoint"}
            assert after.measured
            assert "from measured constants" in after.reason


@pytest.mark.parametrize("settings", [{}, TREE], ids=["flat", "tree"])
@pytest.mark.parametrize("share", [0.0, 0.02])
def test_measurements_that_leave_too_little_are_said_with_a_limit_that_does(settings, share):
    wish = request(**settings, **IN_MLX)
    limit = named_limit(refusal(lambda: fit(under(wish, MIB))))
    limit += int(share * wish.needed(wish.plan))
    coefficients = Coefficients(4.0, 4.0, 4.0, measured=True)
    error = refusal(lambda: refit(under(wish, limit), fit(under(wish, limit)), coefficients))
    assert named_limit(error) > limit
    again = under(wish, named_limit(error))
    assert refit(again, fit(again), coefficients).predicted_bytes < named_limit(error)


def test_what_priors_promised_is_not_refused_for_a_little_more():
    """The limit that a refusal names does, also where the constants turn out a quarter larger."""
    for settings in ({}, TREE):
        wish = request(**settings, **IN_MLX)
        least = named_limit(refusal(lambda wish=wish: fit(under(wish, MIB))))
        room = under(wish, least)
        found = refit(room, fit(room), Coefficients(1.25, 1.25, 1.25, measured=True))
        assert found.predicted_bytes < least


def test_what_is_counted_may_take_more_of_the_limit():
    """Under its own peak and a fifth nothing but rows is given up: packed weights are slow."""
    dense = {key: value for key, value in CONFIG.items() if key != "quantization"}
    wish, other = request(model=dense), request(model=dense, **IN_MLX)
    assert wish.counted(wish.plan)
    assert not other.counted(other.plan)
    assert (wish.share(wish.plan, PRIORS), other.share(other.plan, PRIORS)) == (0.85, PRIOR_SHARE)
    assert "MB counted; limit" in fit(under(wish, 10**12)).reason
    packed = request(**{"memory.micro_rows": 64})
    found = fit(under(packed, 1.2 * packed.estimate(packed.plan).peak))
    assert changes(packed.plan, found) == {}
    found = fit(under(packed, packed.estimate(packed.plan).peak))
    assert found.dequantise
    assert found.micro_rows < 64


def test_the_cpu_engine_is_not_counted_on_where_there_is_a_gpu():
    """A float32 model on a Mac is MLX's too: its priors count, and its batches are as large."""
    dense = {key: value for key, value in CONFIG.items() if key != "quantization"}
    on_mac = request(model=dense | {"torch_dtype": "float32"}, machine=mac(16))
    assert on_mac.sizes.float_bytes == 4
    job = on_mac.workloads[on_mac.plan.group_size]
    assert [engine.name for engine in job.engines] == ["mlx"]
    assert job.engines == engines_for("auto", device="metal")
    assert not on_mac.counted(on_mac.plan)
    assert on_mac.plan.micro_rows == request(model=dense, machine=mac(16), **IN_MLX).plan.micro_rows


def refusal(work) -> MemoryBudgetError:
    with pytest.raises(MemoryBudgetError) as raised:
        work()
    return raised.value


def test_numbers_of_the_prediction_are_no_change():
    plan = want()
    told = {"predicted_bytes": 1, "limit_bytes": 2, "reason": "other", "measured": True}
    assert changes(plan, replace(plan, **told)) == {}


def test_freed_buffers_have_a_share_of_the_limit():
    assert cache_bytes(10**9, on_cpu=False) == 5 * 10**7
    assert cache_bytes(10**9, on_cpu=True) == CACHED_ON_CPU
    assert cache_bytes(10**8, on_cpu=True) == 5 * 10**6


def test_a_mac_told_to_use_its_cpu_is_planned_as_a_cpu():
    wish = request(model=CONFIG, machine=mac(16), **{"model.device": "cpu"})
    assert wish == request(model=CONFIG, machine=mac(16), **{"model.engine": "cpu"})
    metal = request(model=CONFIG, machine=mac(16))
    assert (wish.plan.dequantise, metal.plan.dequantise) == (True, False)
    floats = {w.float_bytes for w in wish.workloads.values()}
    assert floats == {4} != {w.float_bytes for w in metal.workloads.values()}


def on_mac(gigabytes: int, name: str, **settings) -> PlanRequest:
    return request(model=find_known(f"mlx-community/{name}"), machine=mac(gigabytes), **settings)


def test_the_smallest_mac_trains_the_smallest_qwen():
    """Predicted, never run on a Mac."""
    found = fit(on_mac(8, "Qwen3-0.6B-4bit"))
    assert (found.group_size, found.max_completion_tokens) == (2, 256)


@pytest.mark.parametrize("name", ["Qwen3-0.6B-4bit", "Qwen3-1.7B-4bit", "Qwen3-8B-4bit"])
def test_larger_macs_have_larger_plans(name):
    """Each below its limit; once one of them fits, all larger ones do."""
    before: MemoryPlan | None = None
    for gigabytes in (8, 16, 24, 64, 128):
        wish = on_mac(gigabytes, name)
        assert wish.limit.bytes is not None
        assert wish.limit.bytes < gigabytes * 2**30
        try:
            found = fit(wish)
        except MemoryBudgetError:
            assert before is None
            continue
        assert found.predicted_bytes is not None
        assert found.predicted_bytes < wish.limit.bytes
        if before is not None:
            assert found.max_completion_tokens >= before.max_completion_tokens
            assert found.micro_rows >= before.micro_rows or before.grad_checkpoint
        before = found
    assert before is not None
    assert changes(on_mac(128, name).plan, before) == {}


def test_the_least_chunk_is_no_floor_for_who_asks_for_less():
    wish = request(**{"memory.head_chunk": LEAST_CHUNK // 2})
    whole = wish.estimate(wish.plan).peak
    assert fit(under(wish, whole)).head_chunk == LEAST_CHUNK // 2


def test_measurements_do_not_pack_what_was_planned_dense():
    """Packed, all 16 rows would fit; it is the dense plan that was promised."""
    wish = by_hand(82, decode=4, dense=True, tree=True)
    before = fit(wish)
    measured = Coefficients(measured=True)
    more = replace(wish, decode=5.5)  # 50 + 8 * 5.5 = 94; the limit is 109
    assert not fit(more, measured).dequantise
    found = refit(more, before, measured)
    assert (found.dequantise, found.decode_rows) == (True, 8)
    with pytest.raises(MemoryBudgetError):
        refit(replace(wish, decode=7), before, measured)
