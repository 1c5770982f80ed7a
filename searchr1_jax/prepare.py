"""Makes the invented world and a tiny model for it: corpus, questions, tokenizer, random weights.

python -m searchr1_jax.prepare --config=configs/quickstart.py --workdir=runs/quickstart

What it writes are the same files that real data and real models come in, and the other commands read them as such.
It depends on `world.*`, `protocol.*` and `tools` only, so every seed of learning begins with the same.
"""

import os
import pathlib

from absl import flags
import jax

from searchr1_jax.core import files, parallel, settings as settings_lib
from searchr1_jax.data.invented import world as world_lib
from searchr1_jax.models import config as model_config, copying, decoder
from searchr1_jax.models.families import qwen2
from searchr1_jax.retrieval import corpus as corpus_lib
from searchr1_jax.run import command, metrics, model_files, run_directory, tools
from searchr1_jax.text import protocol, tokenizer


def run(settings: settings_lib.Settings, workdir: str | os.PathLike) -> None:
    """Writes the world and the model into the workdir.

    Raises:
      ValueError: where another world, or a user's own files, are there.
    """
    with command.session(settings, workdir, alone=True) as directory, metrics.booked(directory, "prepare"):
        c, called = settings.world, tools.names(settings)
        _claim(settings, directory)
        world = world_lib.make_world(c)
        world_lib.write_world(world, directory)
        metrics.say(f"world: {c.persons} persons and {c.companies} companies in {directory}/corpus.jsonl")

        corpus = corpus_lib.Corpus(directory / "corpus.jsonl")
        templates, passages = settings.protocol, [corpus[i] for i in range(len(corpus))]
        tokens = tokenizer.train(
            [
                *(protocol.render_prompt(templates, q.question) for q in world_lib.questions(world, "train")),
                *(protocol.render_docs(templates, [passage]) for passage in passages),
                templates.correction,
                *(f"<search> {passage.title} </search>" for passage in passages),
            ],
            vocab_size=c.vocab_size,
            added_tokens=protocol.tags(called),
            directory=directory / run_directory.TOKENIZER,
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
            max_positions=settings.rollout.context_tokens,
        )
        params = decoder.init(decoder.Policy, model, seed=c.seed)
        params = copying.prime(parallel.to_host(params), model)
        output = directory / settings.sft.model
        model_files.save(output, model, tokens, params, tools=called)
        size = sum(x.size for x in jax.tree.leaves(params))
        metrics.say(f"model: {size:,} random weights and {tokens.vocab_size} tokens in {output}")


def _claim(settings: settings_lib.Settings, workdir: pathlib.Path) -> None:
    """Says in world.json whose files these are; refuses to replace those of another world, or a user's own."""
    changed = run_directory.world_differences(settings, workdir)
    if changed:
        raise ValueError(f"{workdir} holds another world ({'; '.join(changed)}); choose another --workdir")
    theirs = [name for name in (*world_lib.FILES, settings.sft.model) if (workdir / name).exists()]
    if changed is None and theirs:
        raise ValueError(f"{workdir / theirs[0]} is not of an invented world; choose another --workdir for one")
    files.write_json(workdir / "world.json", run_directory.invented_world(settings))


def main() -> None:
    run(command.settings(), flags.FLAGS.workdir)


if __name__ == "__main__":
    command.run(main, command.define_settings)
