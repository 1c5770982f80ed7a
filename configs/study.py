r"""A study in the quickstart's world: one algorithm and one setting after another.

python -m searchr1_jax.sweep --config=configs/study.py --workdir=runs/study
python -m searchr1_jax.study --workdir=runs/study --readme

METHODS are the rows of the tables: what a method changes, and what papers claim of it. Its runs are called
<method>-seed<seed>.
"""

from configs import quickstart
from searchr1_jax.sweeps import claims


def get_config(arg=""):
    return quickstart.get_config(arg)


PAPERS = """\
What Search-R1's authors saw on Qwen2.5 with Wikipedia (2503.09516, 2505.15117), and whether this world shows it."""

METHODS = {
    "ppo": claims.Method(
        title="PPO",
        seeds=5,
        claims=(
            claims.Claim(
                title="learning to search pays",
                than=claims.BASE,
                expected=+1,
                papers="7B base: .431 after PPO, .304 for retrieval without any learning",
            ),
            claims.Claim(
                title="searches grow more",
                measure=claims.SEARCHES,
                than=claims.BASE_SEARCHES,
                expected=+1,
                papers="about 1.4 a question early in training, 2.0 late",
            ),
        ),
    ),
    "unmasked": claims.Method(
        title="PPO, retrieved tokens not masked",
        seeds=3,
        changes={"algorithm.mask_environment": False},
        claims=(
            claims.Claim(
                title="masking helps",
                against="ppo",
                expected=-1,
                papers="7B base, PPO: .431 masked, .343 when retrieved tokens are learned from",
            ),
        ),
    ),
    # No passage has more than 24 tokens, so 72 hold three. A question that needs two searches then takes about 155 of
    # the 192 tokens of context, so that neither the model nor the packed rows have to be larger; a third search is cut.
    # Its base was taught with three passages a search; from that of the others, taught with one, it unlearns to search.
    "top_3": claims.Method(
        title="PPO, three passages a search",
        changes={"rollout.passages": 3, "rollout.max_information_tokens": 72},
        claims=(
            claims.Claim(
                title="three passages beat one",
                against="ppo",
                expected=+1,
                papers="7B base, PPO: .375 with one passage, .431 with three",
            ),
        ),
    ),
    # A well-formed episode thinks in each turn; this model never writes <think>, so all of its episodes are malformed.
    # What well-formedness is worth could only be taken off every right answer; at 0, right answers are worth 1,
    # and what remains of the form is something it can learn: a wrong answer is worth more than none.
    "format": claims.Method(
        title="PPO, reward of the form too",
        changes={"reward.name": "format_aware", "reward.structure": 0.0, "reward.answered": 0.1},
        claims=(
            claims.Claim(
                title="learns faster",
                measure=claims.EARLY,
                against="ppo",
                expected=+1,
                papers="base models learn faster when the form is rewarded too; here the form is only to answer at all",
            ),
        ),
    ),
    "no_kl": claims.Method(
        title="PPO, no KL", changes={"algorithm.kl_coefficient": 0.0}, claims=(claims.Claim(against="ppo"),)
    ),
    "reinforce_pp": claims.Method(
        title="REINFORCE++", argument="algorithm=reinforce_pp", claims=(claims.Claim(against="ppo"),)
    ),
    "grpo": claims.Method(
        title="GRPO, groups of 5",
        seeds=3,
        argument="algorithm=grpo",
        claims=(
            claims.Claim(
                title="starts faster",
                measure=claims.EARLY,
                against="ppo",
                expected=+1,
                papers="GRPO's reward rises earlier than PPO's",
            ),
            claims.Claim(
                title="collapses later",
                measure=claims.LAST,
                than=claims.BEST,
                expected=-1,
                papers="GRPO's reward breaks down again late in training",
            ),
            claims.Claim(
                title="ends below PPO",
                against="ppo",
                expected=-1,
                papers="7B base: .350, PPO .431; at 3B the other way, .312 and .303",
            ),
        ),
    ),
    "grpo_of_3": claims.Method(
        title="GRPO, groups of 3",
        argument="algorithm=grpo",
        changes={"rollout.samples": 3},
        claims=(
            claims.Claim(
                title="a smaller group ends higher",
                against="grpo",
                expected=+1,
                papers="7B base: .363 with 3 samples a question, .350 with 5",
            ),
        ),
    ),
    "grpo_of_1": claims.Method(  # the advantage of a group of one is the reward itself
        title="GRPO, groups of 1",
        argument="algorithm=grpo",
        changes={"rollout.samples": 1},
        claims=(
            claims.Claim(
                title="a smaller group ends higher",
                against="grpo",
                expected=+1,
                papers="7B base: .410 with 1 sample a question, .350 with 5",
            ),
        ),
    ),
    "rloo": claims.Method(title="RLOO", argument="algorithm=rloo", claims=(claims.Claim(against="grpo"),)),
    "dr_grpo": claims.Method(title="Dr.GRPO", argument="algorithm=dr_grpo", claims=(claims.Claim(against="grpo"),)),
    "dapo": claims.Method(title="DAPO", argument="algorithm=dapo", claims=(claims.Claim(against="grpo"),)),
    "gspo": claims.Method(title="GSPO", argument="algorithm=gspo", claims=(claims.Claim(against="grpo"),)),
}

# What is drawn together; the first in black.
PANELS = {
    "retrieved tokens, groups": ("ppo", "unmasked", "grpo"),
    "algorithms": ("grpo", "rloo", "reinforce_pp", "dr_grpo", "dapo", "gspo"),
    "samples a question": ("grpo", "grpo_of_3", "grpo_of_1"),
    "settings of PPO": ("ppo", "top_3", "format", "no_kl"),
}


def sweep(add):
    for name, method in METHODS.items():
        for seed in range(method.seeds):
            add(f"{name}-seed{seed}", method.argument, seed=seed, **method.changes)
