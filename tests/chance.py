"""A reward that is not the same twice, as that of a judge may be."""

import random


def reward(trajectory) -> float:
    return random.SystemRandom().choice([0.0, 1.0])
