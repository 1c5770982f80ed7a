"""What SIGINT and SIGTERM do: the first asks all processes to stop where nothing is lost, another one ends at once.

SIGINT    after the step in progress, with a checkpoint
SIGTERM   now, as machines that are taken away leave seconds: a rollout is dropped and what was learned before it is
          saved; a step of learning is left after its mini-batch, and not saved
"""

import signal

from searchr1_jax.core import cluster, parallel
from searchr1_jax.run import metrics


class StopSignal:
    """Takes both signals from now on."""

    def __init__(self):
        self.exit_status = 0  # on which all have agreed
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number, frame):
        if cluster.asked_to_stop():
            raise KeyboardInterrupt
        cluster.ask_to_stop(128 + number)
        metrics.say("stopping; once more to stop at once")

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all ask together."""
        self.exit_status = max(parallel.gather(cluster.asked_to_stop()))
        return self.exit_status != 0
