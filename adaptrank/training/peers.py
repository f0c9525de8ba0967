"""The callback that says which process of a run is gone, and ends those that would wait for it."""

import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from adaptrank._collectives import from_all, several
from adaptrank._errors import RunError
from adaptrank.training.callback_order import ensure_in_front

log = logging.getLogger("adaptrank")

EVERY = 0.25
"""Seconds from one look at the other processes to the next."""
PATIENCE = 20.0
"""Seconds that a process may go on after another one is gone, before it is ended."""
NOTICE = 3.0
"""Seconds in which a process that closed its connection is found to be gone."""


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Args:
        host: name of its machine and of its space of process numbers.
        number: its process number.
        started: when it started, in the system's ticks, or "" where the system does not say.
    """

    host: str
    number: int
    started: str

    def is_here(self) -> bool:
        """Return whether this process can see it, and so tell whether it runs."""
        return self.host == _host()

    def runs(self) -> bool:
        """Return whether it runs. A process that ended and that nobody has waited for does not."""
        try:
            os.kill(self.number, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        state, started = _status(self.number)
        return state not in ("Z", "X") and started == self.started


class PeerWatch(Callback):
    """Say which process of a run is gone, and end a process that would wait for it.

    A collective operation fails, or waits for long, when another process is gone. A thread looks
    several times a second whether the processes on this machine still run. If one does not, it says
    so at once, since a launcher may end this process soon. Otherwise this process gets the time to
    fail by itself, and is ended after that. A process on another machine is known
    by the failing operation alone.
    """

    def __init__(self) -> None:
        self.lost: str | None = None
        """The sentence about the process that is gone, or None."""
        self._peers: list[Process] = []
        self._rank = 0
        self._step = 0
        self._over = threading.Event()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exchange process numbers, and begin to look."""
        if not several():
            return
        self.lost = None
        self._rank, self._step = trainer.global_rank, trainer.global_step
        self._peers = from_all(_this_process())
        self._over = threading.Event()
        threading.Thread(target=self._watch, args=(self._over,), daemon=True).start()

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Note the step."""
        self._step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop to look, once no process trains: from now on one may end before the others."""
        if self._peers:
            from_all(self._rank)
            self._over.set()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say which process is gone, if one is. That explains the error of a collective."""
        if not self._peers or self._over.is_set():
            return
        self._over.set()
        if isinstance(exception, KeyboardInterrupt | SystemExit | RunError):
            return
        until = time.monotonic() + NOTICE
        gone = self._gone()
        while not gone and _is_collective(exception) and time.monotonic() < until:
            time.sleep(0.1)
            gone = self._gone()
        if gone or _is_collective(exception):
            self._say(gone)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop to look."""
        self._over.set()

    def _gone(self) -> list[int]:
        """Return the ranks of the processes on this machine that no longer run."""
        return [
            rank
            for rank, peer in enumerate(self._peers)
            if rank != self._rank and peer.is_here() and not peer.runs()
        ]

    def _sentence(self, gone: list[int]) -> str:
        named = " and ".join(f"{rank} (process {self._peers[rank].number})" for rank in gone)
        which = f"Rank {named} of this run is gone" if gone else "Another rank of this run is gone"
        return (
            f"{which}: it was killed, or ended with an error of its own, after step {self._step}. "
            f"Rank {self._rank} cannot go on alone, and ends. Resume from the last checkpoint."
        )

    def _say(self, gone: list[int]) -> None:
        """Log the sentence, once."""
        if self.lost is None:
            self.lost = self._sentence(gone)
            log.error(self.lost)

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(EVERY):
            gone = self._gone()
            if gone:
                self._say(gone)
                if not over.wait(PATIENCE):
                    # The main thread waits in a collective, where no exception reaches it.
                    os._exit(1)
                return


def ensure_peer_watch(trainer: Trainer) -> None:
    """Put `PeerWatch` in front of all callbacks, unless there is one."""
    ensure_in_front(trainer, PeerWatch)


def lost_peer(trainer: Trainer) -> str | None:
    """Return the sentence about a process that is gone, or None if none is known to be."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, PeerWatch):
            return callback.lost
    return None


def _is_collective(exception: BaseException) -> bool:
    """Return whether an error comes from an operation over processes that lost a connection."""
    text = f"{type(exception).__name__} {exception}".lower()
    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    return isinstance(exception, RuntimeError) and any(word in text for word in words)


def _this_process() -> Process:
    return Process(_host(), os.getpid(), _status(os.getpid())[1])


def _host() -> str:
    """Return a name of this machine and its space of process numbers."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


def _status(number: int) -> tuple[str, str]:
    """Return state and start of a process as Linux gives them, or empty texts elsewhere."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    # The second field is the program's name in parentheses, which may hold spaces.
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
