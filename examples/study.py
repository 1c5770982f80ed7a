r"""A study of one's own: GRPO with the reward of the answer, and with rewards of turns.

python -m searchr1_jax.sweep --config=examples/study.py --workdir=runs/turns
python -m searchr1_jax.study --config=examples/study.py --workdir=runs/turns --document=runs/turns/study.md

A method is a row of METHODS: what it changes, and what is claimed of it. Figures, picture, table and verdicts follow.
"""

from configs import quickstart
from searchr1_jax.sweeps import claims


def get_config(arg=""):
    return quickstart.get_config(arg)


PAPERS = "What MT-GRPO's authors saw with credit turn by turn (Zeng et al., 2025), and whether this world shows it."

METHODS = {
    "outcome": claims.Method(title="reward of the answer", seeds=3, argument="algorithm=grpo"),
    "turns": claims.Method(
        title="rewards of turns",
        seeds=3,
        argument="algorithm=turn_grpo",
        changes={"reward.name": "examples.turn_reward:found_then_answered"},
        claims=(
            claims.Claim(
                title="ends higher",
                against="outcome",
                expected=+1,
                papers="50% of the answers exact with credit turn by turn, 20-30% without",
            ),
        ),
    ),
}

PANELS = {"rewards": ("outcome", "turns")}


def sweep(add):
    for name, method in METHODS.items():
        for seed in range(method.seeds):
            add(f"{name}-seed{seed}", method.argument, seed=seed, **method.changes)
