"""Detection of how the other processes of a run end, whatever this one is waiting for.

Every process keeps a connection to rank 0 and sends its end over it. If a connection closes without one, the process
was killed or its machine is gone. Rank 0 notifies the others.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from torch.distributed import Store  # type: ignore[attr-defined]

from villa.distributed.environment import Place
from villa.errors import ConfigError, ConnectionLostError

#: Seconds that the main thread has to end cleanly once another process has ended.
_GRACE = 10.0
#: Seconds that a process has to identify itself.
_HELLO = 60.0
#: Seconds between checks of whether rank 0 is done, and the longest line in bytes.
_LOOK, _LINE = 0.2, 4096
_KEY = "watch"


@dataclass(frozen=True)
class End:
    """The end of a process.

    Attributes:
        rank: rank of the process.
        kind: ``done``; ``failed``, with the reason reported; ``signal``, received by this process only; or ``lost``.
            ``met`` is not an end: rank 0 reports that all processes have connected.
        code: exit code, or the number of the signal.
        host: machine of the process.
        pid: process id on that machine.
    """

    rank: int
    kind: str
    code: int = 0
    host: str = ""
    pid: int = 0


#: Called with the end of a lost process before this one ends because of it.
ON_LOST: list[Callable[[End], None]] = []


class Watch:
    """Watches the other processes of a run. Every process creates one; it waits until all have connected or one ended.

    Args:
        place: position of this process.
        store: the shared store.

    Raises:
        OSError: rank 0 cannot be reached; or, on rank 0, processes have not connected (the message gives their ranks).
        RuntimeError: the store cannot be read.
    """

    def __init__(self, place: Place, store: Store) -> None:
        self._place = place
        self._end: End | None = None
        self._known, self._complete, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._resort = threading.Timer(_GRACE, self._give_up)
        self._resort.daemon = True
        self._peers: dict[socket.socket, End] = {}
        self._lock = threading.Lock()
        if place.rank == 0:
            self._token = secrets.token_hex(16)
            server = socket.create_server(("", 0), backlog=place.world_size)
            own = {"port": server.getsockname()[1], "token": self._token, **_here()}
            store.set(_KEY, json.dumps(own))
            self._start(self._serve, server)
            self._meet_all()
        else:
            main = json.loads(store.get(_KEY))
            link = socket.create_connection((os.environ["MASTER_ADDR"], main["port"]), timeout=_HELLO)
            _keep_alive(link)
            self._peers[link] = End(0, "lost", 1, main["host"], main["pid"])
            self._tell(link, {"token": main["token"], "rank": place.rank, **_here()})
            link.settimeout(None)
            self._start(self._listen, link)
            self._complete.wait()

    def ended(self, wait: float = 0.0) -> End | None:
        """Return the first premature end of another process, or None.

        Args:
            wait: seconds to wait for one.
        """
        self._known.wait(wait)
        return self._end

    def lost(self, end: End) -> ConnectionLostError:
        """Run the ``ON_LOST`` callbacks and return the error that names the lost process."""
        for act in ON_LOST:
            act(end)
        return ConnectionLostError(
            f"process {end.rank} of {self._place.world_size} (pid {end.pid} on {end.host}) was lost: it was killed, or "
            "its machine is gone; go on with checkpoint.resume=true"
        )

    def leave(self, kind: str, code: int = 0) -> None:
        """Tell the others how this process ends, and stop watching them."""
        self._closed.set()
        self._tell_all(End(self._place.rank, kind, code, **_here()))

    def stop(self) -> None:
        """Cancel the deadline for this process's end."""
        self._resort.cancel()

    def _meet_all(self) -> None:
        """Wait on rank 0 for all processes to connect, and notify them."""
        complete = self._complete.wait(self._place.patience)
        with self._lock:
            present = {peer.rank for peer in self._peers.values()}
        if not complete:
            self.leave("failed", ConfigError.exit_code)
            missing = sorted(set(range(1, self._place.world_size)) - present)
            raise TimeoutError(
                f"those of rank {', '.join(map(str, missing))} have not come within {self._place.patience} s "
                "(VILLA_START_TIMEOUT)"
            )
        if self._end is None:
            self._tell_all(End(0, "met"))

    def _start(self, action: Callable[[socket.socket], None], link: socket.socket) -> None:
        threading.Thread(target=action, args=(link,), daemon=True, name="watch").start()

    def _listen(self, link: socket.socket) -> None:
        """Receive from rank 0 that all have connected, then how it or another process ends."""
        with link.makefile("rb") as lines:
            end = _receive(lines, self._peers[link])
            if end.kind == "met":
                self._complete.set()
                end = _receive(lines, self._peers[link])
        self._record_end(end)

    def _serve(self, server: socket.socket) -> None:
        """Accept connections, and receive from each how its process ends."""
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while not self._closed.is_set():
                for key, _ in selector.select(_LOOK):
                    link: Any = key.fileobj
                    if link is server:
                        self._meet(server, selector)
                    else:
                        selector.unregister(link)
                        self._handle_end(link)
                if len(self._peers) == self._place.world_size - 1:
                    self._complete.set()

    def _meet(self, server: socket.socket, selector: selectors.BaseSelector) -> None:
        """Accept a connection of a process that knows the token; close any other."""
        link, _ = server.accept()
        link.settimeout(_HELLO)
        _keep_alive(link)
        try:
            said = json.loads(link.recv(_LINE))
            known = secrets.compare_digest(said["token"], self._token)
            peer = End(int(said["rank"]), "lost", 1, str(said["host"]), int(said["pid"]))
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known:
            link.close()
            return
        with self._lock:
            self._peers[link] = peer
        selector.register(link, selectors.EVENT_READ)

    def _handle_end(self, link: socket.socket) -> None:
        """Receive the end of a process, and notify the others unless it was done."""
        with link.makefile("rb") as lines:
            end = _receive(lines, self._peers[link])
        if end.kind == "done":
            return
        if self._end is None:
            self._tell_all(end, but=link)
        self._record_end(end)

    def _tell_all(self, end: End, but: socket.socket | None = None) -> None:
        with self._lock:
            for link in self._peers:
                if link is not but:
                    self._tell(link, asdict(end))

    def _tell(self, link: socket.socket, what: dict[str, Any]) -> None:
        try:
            link.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            return

    def _record_end(self, end: End) -> None:
        """Record the first premature end, and set a deadline for a main thread that may be stuck."""
        if self._closed.is_set() or self._end is not None or end.kind == "done":
            return
        self._end = end
        self._known.set()
        self._complete.set()
        self._resort.start()

    def _give_up(self) -> None:
        """End this process, whose main thread is waiting for a process that is gone."""
        end = self._end
        if end is None:
            return
        if end.kind == "lost":
            print(f"villa_run: error: {self.lost(end)}", file=sys.__stderr__, flush=True)
        os._exit(128 + end.code if end.kind == "signal" else end.code or 1)


def _receive(lines: BinaryIO, default: End) -> End:
    """Wait for the next message of a process; return ``default`` if it closes without one."""
    try:
        return End(**json.loads(lines.readline(_LINE)))
    except (OSError, ValueError, TypeError):
        return default


def _here() -> dict[str, Any]:
    return {"host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "pid": os.getpid()}


def _keep_alive(link: socket.socket) -> None:
    """Enable keep-alive probes that detect a lost machine within about a minute."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
