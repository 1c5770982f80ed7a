r"""A tiny language model learns to search, from nothing, on a laptop's CPU.

./launch/quickstart.sh

python -m searchr1_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
python -m searchr1_jax.train --config=configs/quickstart.py:algorithm=grpo --workdir=runs/quickstart-grpo
"""

from configs import base, presets


def get_config(arg=""):
    c = base.get_config()

    c.protocol.prompt = "Question: {question}\n"
    c.protocol.correction = "\nInvalid action. Try again.\n"
    c.protocol.information = "\n<information> {docs} </information>\n"
    c.protocol.passage = "Doc {i}: {text}\n"

    c.rollout.questions = 64
    c.rollout.max_turns = 3
    c.rollout.max_turn_tokens = 32
    c.rollout.max_information_tokens = 48
    c.rollout.context_tokens = 192
    c.rollout.passages = 1
    c.rollout.slots = 64
    c.rollout.decode_tokens = 16
    c.rollout.extend_chunks = (16, 32)

    c.algorithm.entropy_coefficient = 0.0

    c.learner.steps = 80
    c.learner.row_tokens = (192,)
    c.learner.micro_batch_rows = 16
    c.learner.vocab_chunk = 192
    c.learner.value_warmup_steps = 2

    c.policy.learning_rate = 5e-4
    c.policy.warmup_steps = 1
    c.policy.final_lr_fraction = 0.1  # sampling noise goes with it
    c.policy.weight_decay = 0.0
    c.value.learning_rate = 1e-3
    c.value.warmup_steps = 1
    c.value.weight_decay = 0.0

    c.evaluation.every = 10
    c.evaluation.questions = 256
    c.evaluation.decoding = ("sampled",)
    c.checkpoint.every = 10
    c.log.trajectories_every = 10

    c.sft.drill_steps = 500
    c.sft.mixture_steps = 200
    c.sft.mixture_right = 0.15
    c.sft.mixture_guess = 0.7
    c.sft.mixture_wrong_entity = 0.05
    c.sft.mixture_stopped_early = 0.1
    c.sft.content_weight = 5.0
    c.sft.batch = 32
    c.sft.optimizer.learning_rate = 4e-3
    c.sft.optimizer.final_lr_fraction = 0.1
    c.sft.optimizer.weight_decay = 0.0

    return presets.apply(c, arg)
