"""Makes the invented world and a tiny model for it: corpus, questions, tokenizer, random weights.

python -m searchr1_jax.prepare --config=configs/quickstart.py --workdir=runs/quickstart

What it writes are the same files that real data and real models come in, and the other verbs read them as such.
It depends on `world.*` and `protocol.*` only, so every seed of learning begins with the same.
"""

from __future__ import annotations

import json
import pathlib

import jax

from searchr1_jax.core import parallel
from searchr1_jax.data.invented import world as world_lib
from searchr1_jax.models import config as model_config
from searchr1_jax.models import copying
from searchr1_jax.models import decoder
from searchr1_jax.models.families import qwen2
from searchr1_jax.retrieval import corpus as corpus_lib
from searchr1_jax.run import command
from searchr1_jax.run import metrics
from searchr1_jax.run import run_directory
from searchr1_jax.run import setup
from searchr1_jax.text import protocol
from searchr1_jax.text import tokenizer

_CONFIG, _WORKDIR = command.define_flags()


def main(argv):
    del argv
    config = _CONFIG.value
    with command.session(config, _WORKDIR.value, alone=True) as workdir, metrics.verb(workdir, "prepare"):
        c = config.world
        _claim(config, workdir)
        world = setup.world(config)
        world_lib.write_world(world, workdir)
        metrics.say(f"world: {c.persons} persons and {c.companies} companies in {workdir}/corpus.jsonl")

        corpus = corpus_lib.Corpus(workdir / "corpus.jsonl")
        texts = setup.texts(config)
        asked = [texts.render_prompt(q.question) for q in world_lib.questions(world, "train")]
        replies = [texts.render_docs([corpus[i]]) for i in range(len(corpus))]
        output = workdir / config.sft.model
        tokens = tokenizer.train(
            [
                *asked,
                *replies,
                texts.correction,
                *(f"<search> {corpus[i].title} </search>" for i in range(len(corpus))),
            ],
            vocab_size=c.vocab_size,
            added_tokens=list(protocol.TAGS),
            directory=workdir / run_directory.TOKENIZER,
        )
        model = model_config.ModelConfig(
            family=qwen2.FAMILY,
            vocab_size=-(-tokens.vocab_size // 64) * 64,
            width=c.width,
            layers=c.layers,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.width // c.heads,
            mlp_width=c.mlp_width,
            rope_theta=c.rope_theta,
            norm_eps=1e-6,
            tied_embeddings=True,
            max_positions=config.rollout.context_tokens,
        )
        params = decoder.init(decoder.Policy, model, seed=c.seed)
        params = copying.prime(parallel.to_host(params), model)
        setup.save_model(output, model, tokens, params)
        size = sum(x.size for x in jax.tree.leaves(params))
        metrics.say(f"model: {size:,} random weights and {tokens.vocab_size} tokens in {output}")


def _claim(config: setup.Config, workdir: pathlib.Path) -> None:
    """Says in world.json whose files these are; refuses to replace those of another world, or a user's own."""
    path, mine = workdir / "world.json", run_directory.invented_world(config)
    if path.exists():
        changed = run_directory.differences(json.loads(path.read_text()), mine)
        if changed:
            raise ValueError(f"{workdir} holds another world ({'; '.join(changed.values())}); choose another --workdir")
    elif theirs := [name for name in (*world_lib.FILES, config.sft.model) if (workdir / name).exists()]:
        raise ValueError(f"{workdir / theirs[0]} is not of an invented world; choose another --workdir for one")
    path.write_text(json.dumps(mine, indent=2) + "\n")


if __name__ == "__main__":
    command.run(main)
