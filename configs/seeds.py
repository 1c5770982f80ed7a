r"""The quickstart with everything drawn again: the base too, and once the world.

python -m searchr1_jax.sweep --config=configs/seeds.py --workdir=runs/seeds
"""

from configs import quickstart


def get_config(arg=""):
    return quickstart.get_config(arg)


def sweep(add):
    for seed in range(5):
        add(f"ppo-seed{seed}", seed=seed, sft=dict(seed=seed))
    add("another-world", seed=1, sft=dict(seed=1), world=dict(seed=1))
