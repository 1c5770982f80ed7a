r"""A harder invented world, for what outgrows the quickstart: half an hour on two busy CPU cores.

Chains of up to three searches, each of which finds three passages; every name is borne by six persons, so that only
name and profession together find one of them; validation and test questions are put in words of the training
questions that training never combines.

CONFIG=configs/world_hard.py WORKDIR=runs/world-hard ./launch/quickstart.sh

Reached on the 1,500 test questions, seed 0, exact match (one search; two; three):

    base    greedy .035 (.024; .026; .054)    sampled .085 (.156; .054; .044)
    PPO     greedy .919 (.956; .898; .904)    sampled .771 (.844; .722; .746)
"""

from configs import presets, quickstart


def get_config(arg=""):
    c = quickstart.get_config()

    c.world.hops = 3
    c.world.namesakes = 6
    c.world.paraphrased = True
    c.world.width = 96
    c.world.layers = 4
    c.world.mlp_width = 288

    c.rollout.passages = 3
    c.rollout.max_turns = 4
    c.rollout.max_information_tokens = 80
    c.rollout.context_tokens = 416
    c.rollout.extend_chunks = (16, 96)

    c.learner.steps = 150
    c.learner.row_tokens = (416,)
    c.learner.micro_batch_rows = 4
    c.learner.vocab_chunk = 208

    c.evaluation.every = 25
    c.checkpoint.every = 25
    c.log.trajectories_every = 25

    c.sft.drill_steps = 700
    c.sft.mixture_steps = 150
    c.sft.optimizer.learning_rate = 3e-3

    return presets.apply(c, arg)
