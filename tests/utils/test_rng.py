from __future__ import annotations

import numpy as np

from localrl.utils.rng import keyed_generator, keyed_uniforms


def test_an_address_always_gives_the_same_numbers():
    np.testing.assert_array_equal(keyed_uniforms(5, 0, 1, "a", 2), keyed_uniforms(5, 0, 1, "a", 2))
    np.testing.assert_array_equal(
        keyed_uniforms(5, 0, 1, "a", 2), keyed_uniforms(50, 0, 1, "a", 2)[:5]
    )


def test_addresses_do_not_run_into_each_other():
    drawn = [
        keyed_uniforms(4, *address).tobytes()
        for address in [
            (0, 1, "a", 2),
            (0, 1, "a", 3),
            (0, 2, "a", 2),
            (1, 1, "a", 2),
            (0, 11, "a"),
            (0, 1, "1a"),
            (0, 1, "b", 2),
        ]
    ]
    assert len(set(drawn)) == len(drawn)


def test_generators_are_the_addresses_own():
    one, same, other = (keyed_generator(0, step, "prompts") for step in (1, 1, 2))
    drawn = one.beta(2.0, 3.0, 5)
    np.testing.assert_array_equal(same.beta(2.0, 3.0, 5), drawn)
    assert not np.array_equal(other.beta(2.0, 3.0, 5), drawn)
    # Uniforms are this generator's integers, at the middle of their places.
    bits = keyed_generator(0, "a").integers(0, 2**23, 3)
    np.testing.assert_array_equal(keyed_uniforms(3, 0, "a") * 2**23 - 0.5, bits)


def test_numbers_are_uniform_and_never_zero_or_one():
    numbers = keyed_uniforms(200_000, "many")
    assert numbers.dtype == np.float32
    assert numbers.min() > 0
    assert numbers.max() < 1
    shares = np.histogram(numbers, bins=10, range=(0, 1))[0] / len(numbers)
    np.testing.assert_allclose(shares, 0.1, atol=0.005)
