"""The calculator: values by hand, and a reason for what has none."""

import pytest

from searchr1_jax.rollout.tools import calculator


@pytest.mark.parametrize(
    "text, value",
    {
        "(3 + 4) * 2": "14",
        "3 + 4 * 2": "11",
        "7 - 2 - 1": "4",  # from the left
        "2 ** 3 ** 2": "512",  # from the right
        "-2 ** 2": "-4",  # the power binds closer than the sign
        "(-2) ** 2": "4",
        "--+3": "3",
        "6 / 3": "2",
        "1 / 3": "0.333333333333",
        "-7 / 2": "-3.5",
        "0.1 + 0.2": "0.3",
        "2 ** -2": "0.25",
        "2 ** 0.5": "1.41421356237",
        "0 * -1.5": "0",
        "1.5e3 + .5": "1500.5",
        "99999999999999999999 + 1": "100000000000000000000",  # exact beyond 2 ** 53
        "2 ** 100": "1267650600228229401496703205376",
        "1 ** 10000000000": "1",
        "(-1) ** 9999999999": "-1",
        "2 ** -10000000000": "0",
        " 1 +\t2 ": "3",
        "(1 +\n2)": "3",
    }.items(),
)
def test_the_value_of_an_expression(text, value):
    assert calculator.compute(text) == value


TOO_LARGE = "a number of more than 50 digits"
ALPHABET = "use numbers, + - * / ** and parentheses only"


@pytest.mark.parametrize(
    "text, reason",
    {
        "1 / 0": "division by zero",
        "1 / (2 - 2.0)": "division by zero",
        "0 ** -1": "division by zero",
        "(-8) ** 0.5": "an even root of a negative number",
        "9 ** 9 ** 9": TOO_LARGE,
        "10 ** 50": TOO_LARGE,
        "1" + "0" * 50: TOO_LARGE,
        "10 ** 25 * 10 ** 25": TOO_LARGE,
        "1.5 ** 1e9": TOO_LARGE,
        "0.5 ** -10000000000": TOO_LARGE,
        "1e999": TOO_LARGE,
        "1 +": "this is not an expression",
        "(1": "this is not an expression",
        "1\n2": "this is not an expression",
        "0777": "this is not an expression",
        "2(3)": ALPHABET,
        "7 // 2": ALPHABET,
        "1, 2": ALPHABET,
        "...": ALPHABET,
        "e": ALPHABET,
        "()": ALPHABET,
        "7 % 2": ALPHABET,
        "2 ^ 3": ALPHABET,
        "True + 1": ALPHABET,
        "1j": ALPHABET,
        "__import__('os').getpid()": ALPHABET,
        "٣ + 1": ALPHABET,  # digits of another script
        "1\x00": ALPHABET,
        "(" * 150: "this is not an expression",
        "1+" * 100 + "1": "longer than 200 characters",
    }.items(),
)
def test_what_has_no_value_is_answered_with_the_reason(text, reason):
    assert calculator.compute(text) == f"error: {reason}"


@pytest.mark.parametrize("text", ["(" * 99 + "1" + ")" * 99, "-" * 198 + "1"])
def test_the_deepest_expression_that_fits_is_computed(text):
    assert calculator.compute(text) == "1"
