# Makes .venv beside the sources if there is none, and installs into it; sourced by the other scripts.
# PYTHON=python3.12 chooses the interpreter that makes it, EXTRAS=gpu (or tpu) an accelerator's jax, VENV=… another
# place. Paths in VENV and WORKDIR are relative to where the script was started.
for name in VENV WORKDIR; do
  case "${!name:-}" in "" | /*) ;; *) declare "$name=$PWD/${!name}" ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then # none yet, or interrupted while it was made
  echo "making $VENV with ${PYTHON:-python3}"
  "${PYTHON:-python3}" -m venv "$VENV"
  rm -f "$VENV"/installed-*
fi
stamp="$VENV/installed-$(cat requirements.txt pyproject.toml | cksum | cut -d' ' -f1)-${EXTRAS:-}"
if [ ! -e "$stamp" ]; then
  echo "installing requirements into $VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[test${EXTRAS:+,$EXTRAS}]"
  touch "$stamp"
fi
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
