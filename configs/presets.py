"""What a config's argument can choose, as in configs/quickstart.py:algorithm=grpo."""


def ppo(c):
    """PPO with a value model and GAE, the KL in the reward."""
    c.algorithm.advantage = "gae"
    c.algorithm.kl_in = "reward"


def grpo(c):
    """GRPO: groups of samples instead of a value model, the KL in the loss."""
    c.algorithm.advantage = "group_standardised"
    c.algorithm.kl_in = "loss"
    c.rollout.samples = 5


ALGORITHMS = {"ppo": ppo, "grpo": grpo}


def apply(c, arg):
    """Applies `key=value,…` to a config; keys: algorithm."""
    for part in filter(None, arg.split(",")):
        key, _, value = part.partition("=")
        if key != "algorithm" or value not in ALGORITHMS:
            raise ValueError(f"config argument {part!r} is unknown; use algorithm={'|'.join(ALGORITHMS)}")
        ALGORITHMS[value](c)
    return c
