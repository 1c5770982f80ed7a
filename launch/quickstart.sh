#!/usr/bin/env bash
# A tiny language model learns to search, from nothing, on this machine's CPU. Reads as a tutorial; safe to
# interrupt and start again.
#
#   SEED=3 ./launch/quickstart.sh              another seed of learning; world, tokenizer and base stay
#   WORKDIR=/tmp/run ./launch/quickstart.sh    another place
#   ./launch/quickstart.sh --config.learner.steps=20    anything else of the config, for all commands
set -euo pipefail
source "$(dirname "$0")/setup.sh"

SEED="${SEED:-0}"
WORKDIR="${WORKDIR:-runs/quickstart-seed$SEED}"
CONFIG="${CONFIG:-configs/quickstart.py}"
step() {
  local name="$1"
  shift
  echo
  echo "== $name"
  "$VENV/bin/python" -m "searchr1_jax.$name" --workdir="$WORKDIR" "$@"
}
settings=(--config="$CONFIG" --config.seed="$SEED" "$@")

# 1. An invented world — a corpus, questions, a tokenizer — and a tiny model with random weights.
[ -d "$WORKDIR/init" ] || step prepare "${settings[@]}"

# 2. Supervised training teaches it what a search and an answer look like, and a bad habit: to guess.
[ -d "$WORKDIR/base" ] || step sft "${settings[@]}"

# 3. What that base can do, on questions about persons and companies that no training question mentions.
[ -e "$WORKDIR/eval/base-sampled.json" ] ||
  step evaluate "${settings[@]}" --model="$WORKDIR/base" --name=base --decoding=greedy,sampled

# 4. Reinforcement learning: the reward is exact match, nothing else. It goes on where it was interrupted.
step train "${settings[@]}"

# 5. The same questions again. The workdir holds a run by now, whose own config is the default.
step evaluate --name=final --decoding=greedy,sampled

# 6. The policy as a Hugging Face directory.
step export --output="$WORKDIR/export" --overwrite

# 7. Before and after.
step compare --before=base --after=final

cat <<TEXT

learning curve   $WORKDIR/learning_curve.png
ask it           $VENV/bin/python -m searchr1_jax.ask --workdir=$WORKDIR
GRPO instead     WORKDIR=runs/grpo CONFIG=configs/quickstart.py:algorithm=grpo ./launch/quickstart.sh
your own model   see README.md
TEXT
