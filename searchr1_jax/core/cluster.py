"""Several processes that live and end together: whatever happens to one, the others know why and do not wait for ever.

    start ─▶ a watch in a thread, over the key-value store of JAX's coordination service
    fail(cause) ─▶ every process ends with it          ask_to_stop(status) ─▶ `asked_to_stop` is true in all of them
    advance() ─▶ "I am at work"; who stops saying so while others wait is named, and everybody ends

JAX itself notices a process that died, after `cluster.heartbeat_s`. It does not notice one that raised an error and
waits at its exit for the others, nor one that hangs in Python: heartbeats come from another thread. Where one process
runs alone there is no watch, and all of this does nothing or concerns it alone.
"""

import atexit
from collections.abc import Iterator
import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time

import jax
from jax._src import distributed  # the key-value store has no public name

from searchr1_jax.core import settings

URGENT = 128 + signal.SIGTERM  # the status of what was told to end now: machines that are taken away leave seconds
_POLL_S = 0.5
_READ_S = 5.0  # for the others to read why all end, before the first process does and takes the store with it
_FAILED, _STOP, _AT = (f"searchr1_jax/{name}/" for name in ("failed", "stop", "at"))


class Stopped(BaseException):
    """What is under way is given up, as somebody asked for it; no error, so that no handler takes it for one."""


@dataclasses.dataclass
class _Watch:
    stalled_s: float = 0.0  # 0: nobody is watched
    count: int = 0  # of what this process has done
    waiting: bool = False  # for the others
    status: int = 0  # to exit with, once somebody was asked to stop; 0 before
    ended: bool = False


_watch = _Watch()


def start(c: settings.Cluster) -> None:
    """Joins the other processes, as the cluster's variables tell, and watches over them from now on."""
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    jax.distributed.initialize(
        initialization_timeout=c.start_s,
        heartbeat_timeout_seconds=c.heartbeat_s,
        shutdown_timeout_seconds=c.heartbeat_s,
    )
    _watch.stalled_s = c.stalled_s
    thread = threading.Thread(target=_run, name="watch", daemon=True)
    thread.start()
    atexit.register(_end, thread)  # called before JAX takes the store away


def _end(thread: threading.Thread) -> None:
    _watch.ended = True
    thread.join()


def name() -> str:
    """This process, for people."""
    return f"process {jax.process_index()} of {jax.process_count()} ({socket.gethostname()})"


def advance() -> None:
    """Says that this process is at work."""
    _watch.count += 1


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Says, while the block runs, that this process waits for the others."""
    _watch.count, _watch.waiting = _watch.count + 1, True
    try:
        yield
    finally:
        _watch.waiting = False


def fail(cause: str, trace: str = "") -> None:
    """Ends all processes; the others print the cause. Does not return where there are several.

    `trace` is printed before it, unless another's end was the cause of this one.
    """
    if (store := _store()) is None:
        return
    if _watch.ended:  # the other thread is about to end this process, and has said why
        time.sleep(2 * _READ_S)
    _watch.ended = True
    if failed := store.key_value_dir_get(_FAILED):  # whose end was our cause
        text = failed[0][1]
    else:
        text = f"{name()}: {cause}"
        store.key_value_set(f"{_FAILED}{jax.process_index()}", text, allow_overwrite=True)
        print(trace, file=sys.stderr, end="")
    print(f"error: {text}", file=sys.stderr, flush=True)
    _leave()


def ask_to_stop(status: int) -> None:
    """Asks this process and all others to stop, and to exit with this status."""
    _watch.status = _watch.status or status
    if (store := _store()) is not None:
        store.key_value_set(f"{_STOP}{jax.process_index()}", str(status), allow_overwrite=True)


def asked_to_stop() -> int:
    """The status to exit with where any process was asked to stop, else 0; the others know a moment later."""
    return _watch.status


def leave_if_urgent() -> None:
    """Raises Stopped where this process was asked to stop at once, by SIGTERM."""
    if _watch.status == URGENT:
        raise Stopped


def _leave() -> None:
    """Ends this process; an ordinary exit would wait for the others."""
    sys.stdout.flush()
    if jax.process_index() == 0:
        time.sleep(_READ_S)
    os._exit(1)


def _store():
    return distributed.global_state.client if jax.process_count() > 1 else None


def _run() -> None:
    """The watch. It asks on where the store does not answer: if that is gone for good, JAX ends the process."""
    store, said, seen = _store(), None, {}
    while store is not None and not _watch.ended:
        try:
            if failed := store.key_value_dir_get(_FAILED):
                _watch.ended = True
                print(f"error: {failed[0][1]}", file=sys.stderr, flush=True)
                _leave()
            if stops := store.key_value_dir_get(_STOP):
                _watch.status = _watch.status or int(stops[0][1])
            if (now := (_watch.count, _watch.waiting)) != said:
                said, state = now, "waits" if now[1] else "works"
                at = f"{name()} {state} {now[0]}"
                store.key_value_set(f"{_AT}{jax.process_index():06}", at, allow_overwrite=True)
            if jax.process_index() == 0:
                _find_stalled(dict(store.key_value_dir_get(_AT)), seen)
        except jax.errors.JaxRuntimeError:
            pass
        time.sleep(_POLL_S)


def _find_stalled(at: dict[str, str], seen: dict[str, tuple[str, float]]) -> None:
    """Ends the run where no process advances any more; who stopped first, and does not wait, keeps the others waiting.

    Args:
      at: what each process says of itself: its name, "waits" or "works", a number.
      seen: the same and when it was new, by process.
    """
    now = time.monotonic()
    for key, text in at.items():
        if seen.get(key, ("", 0.0))[0] != text:
            seen[key] = text, now
    if seen and now - max(since for _, since in seen.values()) > _watch.stalled_s:
        text, since = min(seen.values(), key=lambda each: (" waits " in each[0], each[1]))
        fail(
            f"{text.rsplit(' ', 2)[0]} has done nothing for {now - since:.0f} s, and all wait; look for a search"
            " or a reward that hangs there, or raise cluster.stalled_s"
        )
