r"""The quickstart's world under one algorithm and one setting after another.

python -m searchr1_jax.sweep --config=configs/study.py --workdir=runs/study
python -m searchr1_jax.study --workdir=runs/study --readme

A name is <method>-seed<seed>; what a method is compared with stands in searchr1_jax/claims.py.
"""

from configs import quickstart


def get_config(arg=""):
    return quickstart.get_config(arg)


def sweep(add):
    for seed in range(5):
        add(f"ppo-seed{seed}", seed=seed)
    for seed in range(3):
        add(f"grpo-seed{seed}", "algorithm=grpo", seed=seed)
        add(f"unmasked-seed{seed}", seed=seed, algorithm=dict(mask_environment=False))
    for name in ("rloo", "reinforce_pp", "dr_grpo", "dapo", "gspo"):
        add(f"{name}-seed0", f"algorithm={name}")
    for samples in (1, 3):  # grpo has 5; the advantage of a group of one is the reward itself
        add(f"grpo_of_{samples}-seed0", "algorithm=grpo", rollout=dict(samples=samples))

    # No passage has more than 24 tokens, so 72 hold three. A question that needs two searches then takes about 155 of
    # the 192 tokens of context, so that neither the model nor the packed rows have to be larger; a third search is cut.
    # Its base was taught with three passages a search; from that of the others, taught with one, it unlearns to search.
    add("top_3-seed0", rollout=dict(passages=3, max_information_tokens=72))

    # A well-formed episode thinks in each turn; this model never writes <think>, so all of its episodes are malformed.
    # What well-formedness is worth could only be taken off every right answer; at 0, right answers are worth 1,
    # and what remains of the form is something it can learn: a wrong answer is worth more than none.
    add("format-seed0", reward=dict(name="format_aware", structure=0.0, answered=0.1))

    add("no_kl-seed0", algorithm=dict(kl_coefficient=0.0))
