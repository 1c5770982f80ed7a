"""A sweep whose commands only say that they were asked; files tell them to fail, to wait, or to ask it to stop."""

import pathlib
import signal
import time

ROOT = pathlib.Path(__file__).parents[2]
FAKE_PYTHON = r"""#!/usr/bin/env bash
# `python -m searchr1_jax.<command> --workdir=… …`: notes run and command, makes what the sweep looks at.
command="${2#searchr1_jax.}" workdir="${3#--workdir=}"
run="$(basename "$workdir")"
on() { [ -e "$FAKE/$1-$run-$command" ]; }
until_so() { # until a condition holds, a minute at most
  for _ in $(seq 3000); do if "$@"; then return; fi; sleep 0.02; done
  echo "never: $*"; exit 2
}
told=0
is_told() { [ "$told" = "$1" ]; }
are_begun() { [ "$(grep -c " $command$" "$FAKE/asked")" = "$1" ]; }
released() { ! on hold; }

echo "$run $command" >> "$FAKE/asked"
if on stop; then # twice signals the sweep, and ends when it was passed on twice
  trap 'told=$((told + 1))' TERM
  for times in 1 2; do
    kill -s "$(cat "$FAKE/stop-$run-$command")" "$PPID"
    until_so is_told "$times"
  done
  exit 143
fi
if on signal; then kill -s "$(cat "$FAKE/signal-$run-$command")" "$PPID"; fi
if on meet; then until_so are_begun 2; fi
until_so released
if on fail; then echo "error: the loss is nan"; exit 1; fi
mkdir -p "$workdir/eval"
case "$command" in
  sft) mkdir -p "$workdir/base" && echo weights > "$workdir/base/model" ;;
  evaluate)
    for decoding in greedy sampled; do
      for name in base final; do echo '{"em": 0.5, "searches": 1}' > "$workdir/eval/$name-$decoding.json"; done
    done ;;
esac
echo "$run $command ends" >> "$FAKE/asked"
"""


class Place:
    """A config file and a workdir, and what the commands noted."""

    def __init__(self, directory: pathlib.Path):
        self.directory, self.workdir = directory, directory / "runs"
        self.config = directory / "tiny.py"
        self.python = directory / "python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def write(self, *calls: str, change: str = "") -> None:
        """The sweep of these calls of add, over the quickstart's config with a change."""
        body = "".join(f"    {call}\n" for call in calls)
        make = f"def get_config(arg=''):\n    c = quickstart.get_config(arg)\n    {change}\n    return c\n"
        self.config.write_text(f"from configs import quickstart\n{make}\ndef sweep(add):\n{body}")

    def tell(self, what: str, text: str = "") -> pathlib.Path:
        """Leaves a file that tells a command what to do: <what>-<run>-<command>."""
        (path := self.directory / what).write_text(text)
        return path

    def lines(self) -> list[str]:
        path = self.directory / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def asked(self) -> list[str]:
        """ "<run> <command>" of each command that was begun since the last call; bases are called base."""
        lines = [line for line in self.lines() if not line.endswith("ends")]
        (self.directory / "asked").write_text("")
        return ["base " + line.split()[1] if line.startswith("_base-") else line for line in lines]

    def wait_for(self, line: str) -> None:
        """Until a command has noted so."""
        deadline = time.monotonic() + 60
        while line not in self.lines():
            assert time.monotonic() < deadline, f"{line} did not come"
            time.sleep(0.02)


def undisturbed_signals():
    """Signals as a shell in the foreground has them, whatever started the tests. A generator, for fixtures."""
    numbers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
