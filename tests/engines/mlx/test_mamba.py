"""Mamba 2 over chunks beside mlx-lm's pieces of 256 tokens: values, gradients, memory."""

from __future__ import annotations

import pytest

from localrl.backend import mx
from localrl.engines.mlx.mamba import CHUNK, ssm_update


def draw(tokens, *, rows=2, heads=4, groups=2, width=8, size=16, seed=0):
    """Inputs of mlx-lm's `ssm_update`, with decays per token of 0 to -50, and a state."""
    keys = iter(mx.random.split(mx.random.key(seed), 7))
    x = mx.random.normal((rows, tokens, heads, width), key=next(keys))
    b, c = (mx.random.normal((rows, tokens, groups, size), key=next(keys)) for _ in "bc")
    dt = 2 * mx.random.normal((rows, tokens, heads), key=next(keys)) - 2
    a_log = mx.log(mx.random.uniform(1, 16, (heads,), key=next(keys)))
    state = mx.random.normal((rows, heads, width, size), key=next(keys))
    d = mx.random.normal((heads,), key=next(keys))
    return x, b, c, dt, state, a_log, d


def ours(x, b, c, dt, state, a_log, d, **options):
    return ssm_update(x, a_log, b, c, d, dt, mx.full(d.shape, 0.5), state, **options)


def stock(x, b, c, dt, state, a_log, d, **options):
    from mlx_lm.models import ssm

    return ssm.ssm_update(x, a_log, b, c, d, dt, mx.full(d.shape, 0.5), state, **options)


def relative(found, expected):
    return float(mx.linalg.norm((found - expected).flatten()) / mx.linalg.norm(expected.flatten()))


def gradients(function, given, **options):
    """Gradients of a weighted sum of the outputs and the last state, by what a token brings."""
    y, state = (mx.random.normal(array.shape, key=mx.random.key(9)) for array in stock(*given))

    def loss(*parts):
        found = function(*parts, *given[len(parts) :], **options)
        return (found[0] * y).sum() + (found[1] * state).sum()

    wanted = 5 if given[4] is not None else 4
    return mx.grad(loss, argnums=range(wanted))(*given[:wanted])


@pytest.mark.parametrize("tokens", [1, 2, 7, CHUNK, CHUNK + 1, 300])
def test_values_and_gradients_are_mlx_lms(tokens):
    given = draw(tokens)
    for found, expected in zip(ours(*given), stock(*given), strict=True):
        assert relative(found, expected) < 1e-5
    for found, expected in zip(gradients(ours, given), gradients(stock, given), strict=True):
        assert relative(found, expected) < 1e-5


def test_rows_without_a_state_begin_with_zeros():
    *given, a_log, d = draw(CHUNK + 5)
    given = (*given[:4], None, a_log, d)
    for found, expected in zip(ours(*given), stock(*given), strict=True):
        assert relative(found, expected) < 1e-5
    for found, expected in zip(gradients(ours, given), gradients(stock, given), strict=True):
        assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("lengths", [[1, CHUNK + 3], [CHUNK, 2], [40, 0]])
def test_padding_leaves_the_state(lengths):
    """A mask is enough; mlx-lm's function needs lengths too, which not every family gives it."""
    given = draw(CHUNK + 3)
    mask = mx.arange(CHUNK + 3) < mx.array(lengths)[:, None]
    y, state = ours(*given, mask=mask)
    assert (ours(*given, lengths=mx.array(lengths))[1] == state).all()
    for row, length in enumerate(lengths):
        before = given[4][row : row + 1]
        if not length:
            assert (state[row] == before[0]).all()
            continue
        alone = stock(*(array[row : row + 1, :length] for array in given[:4]), before, *given[5:])
        assert relative(state[row], alone[1][0]) < 1e-5
        assert relative(y[row, :length], alone[0][0]) < 1e-5


def test_long_decays_lose_no_digits():
    """A token that decays by little after many that decayed by a lot."""
    x, b, c, dt, state, a_log, d = draw(CHUNK)
    dt = mx.where(mx.arange(CHUNK)[:, None] < CHUNK - 8, 20.0, -8.0) + 0 * dt
    given = (x, b, c, dt, state, a_log, d)
    assert relative(ours(*given)[1], stock(*given)[1]) < 1e-6
    *pairs, (lost, _) = zip(gradients(ours, given), gradients(stock, given), strict=True)
    assert not lost.any()  # nothing is left of the first state
    for found, expected in pairs:
        assert relative(found, expected) < 1e-5


def test_memory_grows_with_tokens_and_stays_far_below_mlx_lms():
    def peak(function, tokens):
        given = draw(tokens, rows=1, heads=8, groups=1, width=64, size=64)
        mx.eval(given)
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(gradients(function, given))
        return mx.get_peak_memory() - held

    short, long = (peak(ours, n * CHUNK) for n in (2, 6))
    assert long < 3.5 * short
    assert short < peak(stock, 2 * CHUNK) / 4


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sixteen_bits_are_computed_in_float32(dtype):
    *given, state, a_log, d = draw(CHUNK + 1)
    half = [array.astype(dtype) for array in given]
    expected = stock(*(array.astype(mx.float32) for array in half), state, a_log, d)
    found = ours(*half, state, a_log, d)
    assert relative(found[1], expected[1]) < 1e-5
    assert relative(found[0], expected[0]) < 1e-2


def test_a_decoded_token_is_mlx_lms(monkeypatch):
    from mlx_lm.models import ssm

    given, asked = draw(1), []
    update = ssm.ssm_update
    monkeypatch.setattr(ssm, "ssm_update", lambda *a, **o: asked.append(1) or update(*a, **o))
    ours(*given)
    assert asked
    ours(*given, mask=mx.array([[True], [True]]))  # a level of a forest, whose gradient is wanted
    assert len(asked) == 1
