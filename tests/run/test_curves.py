"""searchr1_jax/run/curves.py: what is drawn."""

from searchr1_jax.run import curves


def test_a_band_holds_the_steps_that_all_runs_have():
    first = [{"step": 0, "em": 0.25}, {"step": 1}, {"step": 2, "em": 0.5}, {"step": 4, "em": 1.0}]
    second = [{"step": 0, "em": 0.75}, {"step": 1, "em": 0.3}, {"step": 2, "em": 0.5}]
    assert curves.band([first, second], "em") == curves.Band(
        steps=[0, 2], mean=[0.5, 0.5], low=[0.25, 0.5], high=[0.75, 0.5]
    )
