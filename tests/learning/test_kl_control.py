"""The coefficient of the KL penalty: held, or steered."""

import math

import by_hand
import pytest

from searchr1_jax.learning import kl_control

ADAPTIVE = by_hand.algorithm(kl_target=0.1, kl_horizon=1000)


def test_without_a_target_the_coefficient_stays():
    assert kl_control.next_coefficient(by_hand.algorithm(), 0.001, kl=50.0, trajectories=10_000) == 0.001


@pytest.mark.parametrize(
    "kl, factor",
    [
        (0.1, 1.0),
        (0.11, 1.01),  # e = 0.1, and a tenth of the horizon
        (0.09, 0.99),
        (0.5, 1.02),  # e = 4, clipped to 0.2
        (0.0, 0.98),
        (-3.0, 0.98),  # k1 estimates may be negative
    ],
)
@pytest.mark.parametrize("coefficient", [0.5, 4.0])
def test_the_coefficient_moves_by_the_clipped_error_and_the_share_of_the_horizon(kl, factor, coefficient):
    moved = kl_control.next_coefficient(ADAPTIVE, coefficient, kl, trajectories=100)
    assert moved == pytest.approx(coefficient * factor)


def test_a_kl_that_falls_with_the_coefficient_is_brought_to_its_target():
    coefficient = 0.5
    for _ in range(300):
        coefficient = kl_control.next_coefficient(ADAPTIVE, coefficient, kl=0.2 / coefficient, trajectories=100)
    assert coefficient == pytest.approx(2.0, rel=1e-6)


def test_an_unknown_kl_does_not_pass_for_a_known_one():
    assert math.isnan(kl_control.next_coefficient(ADAPTIVE, 0.5, math.nan, trajectories=100))
