"""What a config's argument can choose, as in configs/quickstart.py:algorithm=grpo."""


def ppo(c):
    """PPO with a value model and GAE, the KL in the reward (Schulman et al., 2017; Jin et al., 2025)."""
    c.algorithm.advantage = "gae"
    c.algorithm.kl_in = "reward"
    c.algorithm.kl_estimator = "k1"


def grpo(c):
    """Groups of samples instead of a value model, the KL in the loss (Shao et al., 2024; Jin et al., 2025)."""
    c.algorithm.advantage = "group_standardised"
    c.algorithm.kl_in = "loss"
    c.algorithm.kl_estimator = "k3"
    c.rollout.samples = 5
    c.learner.value_warmup_steps = 0  # there is no value model


def rloo(c):
    """Each sample against the mean of the others (Ahmadian et al., 2024)."""
    grpo(c)
    c.algorithm.advantage = "leave_one_out"


def reinforce_pp(c):
    """REINFORCE++: returns with the KL in them, whitened over the rollout, no value model (Hu, 2025)."""
    ppo(c)
    c.algorithm.advantage = "return"
    c.learner.value_warmup_steps = 0


def dr_grpo(c):
    """GRPO without what favours long wrong answers and easy questions: no std, no lengths, no KL (Liu et al., 2025)."""
    grpo(c)
    c.algorithm.advantage = "group_mean"
    c.algorithm.aggregation = "constant"
    c.algorithm.kl_coefficient = 0.0


def dapo(c):
    """GRPO that clips higher above, leaves out groups without variance, and has no KL (Yu et al., 2025).

    Groups left out are not sampled again, and overlong episodes are not punished.
    """
    grpo(c)
    c.algorithm.clip_high = 0.28
    c.algorithm.drop_equal_groups = True
    c.algorithm.kl_coefficient = 0.0


def gspo(c):
    """GRPO whose ratio is that of the whole trajectory (Zheng et al., 2025)."""
    grpo(c)
    c.algorithm.policy_loss = "gspo_clip"
    c.algorithm.aggregation = "sequence_mean"
    c.algorithm.clip_low = 3e-4
    c.algorithm.clip_high = 4e-4


def turn_grpo(c):
    """GRPO with rewards of turns: a turn is credited with what comes after it (Shao et al., 2024; Zeng et al., 2025).

    For a reward that gives one number a turn, as examples/turn_reward.py does.
    """
    grpo(c)
    c.algorithm.advantage = "turn_returns"


ALGORITHMS = {preset.__name__: preset for preset in (ppo, grpo, rloo, reinforce_pp, dr_grpo, dapo, gspo, turn_grpo)}


def apply(c, arg):
    """Applies `key=value,…` to a config; keys: algorithm."""
    for part in filter(None, arg.split(",")):
        key, _, value = part.partition("=")
        if key != "algorithm" or value not in ALGORITHMS:
            raise ValueError(f"config argument {part!r} is unknown; use algorithm={'|'.join(ALGORITHMS)}")
        ALGORITHMS[value](c)
    return c
