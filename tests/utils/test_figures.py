"""Numbers in a few characters."""

import pytest

from localrl.utils.figures import fixed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (-0.5, "-0.500"),
        (999_999.0, "999999.000"),
        (1e6, "1e+06"),
        (1e300, "1e+300"),
        (-1.234e300, "-1.23e+300"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_no_number_is_long(value: float, text: str) -> None:
    assert fixed(value) == text


def test_decimals_can_be_fewer() -> None:
    assert (fixed(12.34, 1), fixed(1e300, 1)) == ("12.3", "1e+300")
