# Makes .venv beside the sources if there is none, and installs into it; sourced by the other scripts.
# PYTHON=python3.12 chooses the interpreter, EXTRAS=gpu (or tpu) an accelerator's jax.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
if [ ! -x "$VENV/bin/python" ]; then
  echo "making $VENV with ${PYTHON:-python3}"
  "${PYTHON:-python3}" -m venv "$VENV"
fi
stamp="$VENV/installed-$(cat requirements.txt pyproject.toml | cksum | cut -d' ' -f1)-${EXTRAS:-}"
if [ ! -e "$stamp" ]; then
  echo "installing requirements into $VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[test${EXTRAS:+,$EXTRAS}]"
  touch "$stamp"
fi
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
