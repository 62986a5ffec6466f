"""What is computed in C is what NumPy computes; on any number of threads, in the same bits."""

import os
import threading

import numpy as np
import pytest
from waiting import DEADLINE_S

from localrl import backend
from localrl.backend import kernels, mx
from localrl.engines.cpu.attention import Attention
from localrl.engines.cpu.buffers import release_all
from localrl.engines.cpu.kernel_choice import COLUMNS, NUMPY, Choice, using
from localrl.engines.cpu.math import (
    FusedLinear,
    Norm,
    matmul,
    swiglu,
    swiglu_back,
)
from localrl.engines.cpu.sampling import draw

pytestmark = pytest.mark.skipif(kernels is None, reason="built without a C compiler")

COUNTS = (1, 3, 8, 16, 17, 64, 65, 531)


def numbers(*shape: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


@pytest.fixture(params=kernels.builds() if kernels else [], autouse=True)
def width(request):
    """Each build that this processor can run: the narrower ones too."""
    with using(Choice(request.param, COLUMNS)):
        yield request.param


@pytest.fixture
def in_numpy():
    """Compute it a second time, without C."""

    def again(work):
        with using(NUMPY):
            return work()

    return again


def check(work, in_numpy, atol=2e-5):
    mine, theirs = work(), in_numpy(work)
    if isinstance(mine, np.ndarray):
        mine, theirs = (mine,), (theirs,)
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=2e-5)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 15, 16])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 7), (8, 16), (67, 33), (512, 256)])
def test_a_product_of_few_columns(in_numpy, m, k, n):
    weight, x = numbers(m, k), numbers(k, n, seed=1)
    check(lambda: matmul(weight, x), in_numpy, atol=1e-4)


@pytest.mark.parametrize("few", [0, 255])
@pytest.mark.parametrize("n", [1, 16, 17, 40, 600])
@pytest.mark.parametrize(("m", "k"), [(19, 33), (960, 300)])
def test_products_of_all_layouts(width, few, m, k, n):
    a, b = numbers(m, k, scale=1), numbers(k, n, seed=1, scale=1)
    kernels.use(width, few)
    for one in (a, np.ascontiguousarray(a.T).T):
        for other in (b, np.ascontiguousarray(b.T).T, np.hstack([b, b])[:, :n]):
            for turned in (False, True):
                out = np.ones((n, m) if turned else (m, n), np.float32)
                kernels.matmul(one, other, out, True, turned)
                np.testing.assert_allclose(out.T if turned else out, 1 + a @ b, atol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8, 9, 33, 200])
@pytest.mark.parametrize(("m", "k", "rank"), [(5, 7, 2), (64, 40, 16), (300, 96, 5)])
def test_layers_with_adapters(in_numpy, m, k, rank, n):
    up = numbers(m, 2 * rank, scale=1)
    up[: m // 2, rank:] = up[m // 2 :, :rank] = 0
    places = slice(0, m // 2), slice(m // 2, m)
    bias = numbers(m, 1)
    layers = FusedLinear(numbers(m, k, scale=1), places, bias, numbers(2 * rank, k, scale=1), up)
    x = numbers(k, n, seed=1, scale=1)
    check(lambda: layers(x), in_numpy, atol=1e-3)


@pytest.mark.parametrize("n", [65, 100, 128, 129])
def test_what_layers_with_adapters_make_of_a_pass_is_counted(n):
    """It lies in MLX's memory, however it was multiplied: plans and limits are of that."""
    layers = FusedLinear(numbers(300, 96), (slice(0, 300),), None, numbers(4, 96), numbers(300, 4))
    release_all()  # buffers of other tests would be lent
    x, before = numbers(96, n), mx.get_active_memory()
    [made] = layers(x)
    assert mx.get_active_memory() - before >= made.nbytes


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 1000, 49152, 200_001])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_tokens_are_drawn_as_numpy_draws_them(in_numpy, vocabulary, temperature):
    logits = numbers(6, vocabulary, scale=4)
    logits[1] = -np.inf  # of weight 0, but for one
    logits[1, vocabulary // 2] = 3
    uniforms = np.array([0.001, 0.2, 0.4, 0.6, 0.8, 0.999], F) if temperature else None
    check(lambda: draw(logits, uniforms, temperature), in_numpy, atol=1e-3)


def test_a_draw_from_no_numbers_is_seen():
    logits = numbers(3, 50)
    logits[0, 7], logits[1, 7] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        tokens, logprobs, _ = draw(logits, np.full(3, 0.5, F), 1.0)
    assert np.isnan(logprobs[:2]).all()
    assert np.isfinite(logprobs[2])
    assert ((tokens >= 0) & (tokens < 50)).all()


def test_every_token_is_drawn_as_often_as_it_should():
    """The uniform numbers between two sums are those of one token, whatever part it is in."""
    logits = numbers(1, 700, scale=1)
    weights = np.exp(logits[0].astype(np.float64))
    edges = np.concatenate([[0], np.cumsum(weights / weights.sum())])
    middles = ((edges[1:] + edges[:-1]) / 2).astype(F)
    tokens, _, _ = draw(np.repeat(logits, 700, axis=0), middles, 1.0)
    np.testing.assert_array_equal(tokens, np.arange(700))


@pytest.mark.parametrize("n", COUNTS)
def test_a_norm_and_its_way_back(in_numpy, n):
    norm = Norm(numbers(32, 1), 1e-6)
    x, grad = numbers(3, 32, n, seed=1), numbers(3, 32, n, seed=2)
    check(lambda: norm(x), in_numpy)
    check(lambda: norm(x[0]), in_numpy)
    check(lambda: norm.back(x, grad.copy()), in_numpy)


@pytest.mark.parametrize("n", COUNTS)
def test_a_gate_and_its_way_back(in_numpy, n):
    gate, x, grad = (numbers(24, n, seed=seed, scale=8) for seed in range(3))
    check(lambda: swiglu(gate, x), in_numpy, atol=1e-4)
    check(lambda: swiglu_back(gate, x, grad.copy()), in_numpy, atol=1e-3)


def test_gates_far_out(in_numpy):
    gate = np.array([[-np.inf, -1e30, -104, -88.5, -87, 0, 87, 88.8, 200, 1e30, np.nan]], "f")
    with np.errstate(all="ignore"):
        check(lambda: swiglu(gate, np.ones_like(gate)), in_numpy)


@pytest.mark.parametrize("past", [0, 1, 37])
@pytest.mark.parametrize("length", [1, 8, 13, 150])
@pytest.mark.parametrize(("size", "more"), [(16, 2), (32, 1), (48, 3)])
def test_attention_and_its_way_back(in_numpy, past, length, size, more):
    shape = (3, 2, more, length, size)
    queries, grad = numbers(*shape), numbers(*shape, seed=1)
    keys, values = (numbers(3, 2, past + length, size, seed=seed) for seed in (2, 3))
    valid = np.random.default_rng(4).random((3, past)) < 0.8

    def work():
        attention = Attention(queries, keys, values, valid, size**-0.5)
        found = attention.forward()
        return [array.copy() for array in (found, *attention.back(found, grad))]

    check(work, in_numpy, atol=2e-4)


def test_heads_of_other_sizes_are_numpys():
    attention = Attention(
        numbers(1, 1, 1, 3, 12), numbers(1, 1, 3, 12), numbers(1, 1, 3, 12), np.ones((1, 0)), 1.0
    )
    assert attention.forward().shape == (1, 1, 1, 3, 12)


def everything() -> list[np.ndarray]:
    """Large enough for several threads."""
    norm = Norm(numbers(64, 1), 1e-6)
    x, gate, grad = (numbers(64, 2000, seed=seed) for seed in range(3))
    shape = (4, 2, 1, 70, 32)
    queries, grad_out = numbers(*shape), numbers(*shape, seed=1)
    keys, values = (numbers(4, 2, 170, 32, seed=seed) for seed in (2, 3))
    attention = Attention(queries, keys, values, np.ones((4, 100), bool), 0.2)
    found = attention.forward()
    layers = FusedLinear(
        numbers(500, 64), (slice(0, 500),), None, numbers(16, 64), numbers(500, 16), (None,)
    )
    arrays = [
        matmul(numbers(3000, 64), x[:, :16]),
        matmul(numbers(3000, 64), x[:, :1]),
        matmul(numbers(700, 64), x),
        matmul(x, numbers(30, 2000).T),
        layers(x[:, :9])[0],
        draw(numbers(9, 3000), np.full(9, 0.3, np.float32), 1.0)[1],
        norm(x),
        norm.back(x, grad.copy()),
        swiglu(gate, x),
        *swiglu_back(gate, x, grad.copy()),
        found,
        *attention.back(found, grad_out),
    ]
    return [array.copy() for array in arrays]


@pytest.fixture
def threads():
    """Set the number, which is put back."""
    before = backend.describe().threads or 1
    yield kernels.set_threads
    kernels.set_threads(before)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_threads_change_no_bit(threads):
    threads(1)
    alone = everything()
    for count in (2, 3, 8):
        assert threads(count) == count
        for _ in range(3):
            same(everything(), alone)


def test_several_callers_at_once(threads):
    threads(2)
    expected, found = everything(), []
    callers = [threading.Thread(target=lambda: found.append(everything())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(DEADLINE_S)
    assert len(found) == 4
    for one in found:
        same(one, expected)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_finds_helpers_of_its_own(threads):
    threads(2)
    weight, x = numbers(3000, 64), numbers(64, 16)
    expected = matmul(weight, x)
    over = threading.Event()

    def work_on():
        while not over.is_set():
            matmul(weight, x)

    busy = threading.Thread(target=work_on)  # the child may be born while the team has work
    busy.start()
    for _ in range(20):
        child = os.fork()
        if child == 0:
            right = all(np.array_equal(matmul(weight, x), expected) for _ in range(20))
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    over.set()
    busy.join()


def test_no_thread_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        kernels.set_threads(0)


F = np.float32
GAPS, ONES = np.ones((4, 6), F)[:, ::2], np.ones((2, 2), F)
DRAWN = np.zeros(2, int), np.zeros(2, F), np.zeros(2, F)
CACHE = np.zeros((1, 1, 3, 16), F)
TOKEN = (*np.ones((3, 16, 1), F), CACHE, CACHE, np.array([2]), np.ones((16, 1), F))


@pytest.mark.parametrize(
    ("name", "given", "error"),
    [
        ("matmul", (np.ones((2, 3), F), np.ones((4, 2), F), np.ones((2, 2), F), 0, 0), ValueError),
        ("matmul", (np.ones((2, 3), F), np.ones((3, 2)), np.ones((2, 2), F), 0, 0), TypeError),
        ("matmul", (np.ones((2, 3), F), np.ones((3, 2), F)), TypeError),
        (
            "matmul",
            (np.ones((4, 6), F)[:, ::2], np.ones((3, 2), F), np.ones((4, 2), F), 0, 0),
            TypeError,
        ),
        ("norm", (np.ones((4, 2), F), np.ones(3, F), np.ones((4, 2), F), 1e-6), ValueError),
        ("norm", (np.ones((4, 2), F), np.ones(4, F), np.ones((4, 2), F), "1"), TypeError),
        ("norm_back", (np.ones((4, 2), F), np.ones(4, F), np.ones((4, 3), F), 1e-6), ValueError),
        ("swiglu", (np.ones(4, F), np.ones(3, F), np.ones(4, F)), ValueError),
        ("swiglu_back", (np.ones(4, F), np.ones(4, F), np.ones(4, F), np.ones(3, F)), ValueError),
        ("linear", (ONES, ONES, np.ones((2, 3), F), ONES, ONES), ValueError),
        ("linear", (ONES, ONES, ONES, ONES), TypeError),
        ("draw", (ONES, None, *DRAWN[:2], np.ones(3, F), 1.0), ValueError),
        ("draw", (ONES, np.ones(3, F), *DRAWN, 1.0), ValueError),
        ("draw", (ONES, None, np.zeros(2, F), *DRAWN[1:], 1.0), TypeError),
        ("attend_token", (*TOKEN[:5], np.array([3]), TOKEN[6], None, 1.0), ValueError),
        ("attend_token", (*TOKEN[:5], np.array([-1]), TOKEN[6], None, 1.0), ValueError),
        ("attend_token", (*TOKEN[:6], np.ones(17, F), None, 1.0), ValueError),
        ("attend_token", (*TOKEN, np.zeros(3, int), 1.0), ValueError),
        ("attend_token", TOKEN, TypeError),
    ],
)
def test_arrays_that_do_not_go_together(name, given, error):
    with pytest.raises(error):
        getattr(kernels, name)(*given)
