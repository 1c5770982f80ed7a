r"""Search-R1 as published (Jin et al., 2025): NQ and HotpotQA, Qwen2.5, E5 over Wikipedia behind a server.

python -m searchr1_jax.train --config=configs/search_r1.py:algorithm=ppo --workdir=runs/search-r1-ppo \
    --config.model.path=/models/Qwen2.5-3B --config.retriever.url=http://127.0.0.1:8000/retrieve

Question files are those of FlashRAG, each with the name of its set; put them, or links to them, into the workdir.
What differs from the published scripts on purpose is listed in the README.
"""

from configs import base, presets


def get_config(arg=""):
    c = base.get_config()

    c.data.train = ("nq=nq/train.jsonl", "hotpotqa=hotpotqa/train.jsonl")
    c.data.validation = ("nq=nq/test.jsonl",)
    c.data.test = (
        "nq=nq/test.jsonl", "triviaqa=triviaqa/test.jsonl", "popqa=popqa/test.jsonl", "hotpotqa=hotpotqa/dev.jsonl",
        "2wikimultihopqa=2wikimultihopqa/dev.jsonl", "musique=musique/dev.jsonl", "bamboogle=bamboogle/test.jsonl",
    )  # fmt: skip

    c.model.compute_dtype = "bfloat16"
    c.model.reference_dtype = "bfloat16"
    c.model.actor_dtype = "bfloat16"
    c.model.remat = True
    c.retriever.url = "http://127.0.0.1:8000/retrieve"
    c.retriever.threads = 8

    c.learner.steps = 1005
    c.policy.learning_rate = 1e-6
    c.policy.warmup_steps = 286  # .285 of the steps
    c.value.learning_rate = 1e-5
    c.value.warmup_steps = 15  # .015 of the steps
    c.evaluation.questions = 512
    c.evaluation.every = 100
    c.checkpoint.every = 100

    presets.apply(c, arg)
    if c.rollout.samples > 1:
        # The published mini-batches hold 256 trajectories: 512 questions x 5 samples make 10 updates a rollout.
        c.learner.updates_per_rollout = 10
        c.learner.minibatch_by = "trajectories"
    return c
