"""The processes of a run: connecting, exchanging small messages, and ending together."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from villa.distributed.environment import Place
from villa.distributed.watch import End, Watch
from villa.errors import ConfigError, ConnectionLostError, VillaError, one_line
from villa.signals import Interrupted

#: Seconds that the process hosting the store waits for the others after an error.
_FAREWELL = 10.0
#: Seconds after a broken connection until the lost process is known.
_VERDICT = 3.0
_FAILED, _LEFT = "failed", "left"


class Processes:
    """The processes of a run as seen from one of them; by default a single process.

    All methods that communicate are collective calls: every process makes them in the same order. Messages go through
    main memory.

    Args:
        place: position of this process.

    Attributes:
        rank: rank of this process.
        world_size: number of processes.
    """

    def __init__(self, place: Place | None = None) -> None:
        place = place or Place()
        self.rank, self.world_size = place.rank, place.world_size

    @classmethod
    def connected(cls) -> Processes:
        """Return the processes connected by ``join``."""
        return cls(Place(dist.get_rank(), dist.get_world_size()) if _connected() else None)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        self.largest(0)

    def total(self, values: list[float]) -> list[float]:
        """Sum each value over all processes."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, value: int) -> int:
        """Return the maximum over all processes."""
        return int(self._reduced([value], dist.ReduceOp.MAX)[0])

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, by rank.

        Args:
            value: any JSON value; floats are exact.
        """
        if self.world_size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(length) for length in self._gathered(torch.tensor([len(text)]))]
        padded = torch.cat((text, text.new_zeros(max(lengths) - len(text))))
        texts = zip(self._gathered(padded), lengths, strict=True)
        return [json.loads(bytes(text[:length].tolist())) for text, length in texts]

    def gather_tensors(self, tensor: Tensor) -> list[Tensor]:
        """Gather a tensor from every process, by rank, in main memory; only first dimensions may differ."""
        if self.world_size == 1:
            return [tensor]
        shapes = self.gather(list(tensor.shape))
        most, rest = max(shape[0] for shape in shapes), max(shapes, key=len)[1:]
        padded = torch.zeros(most, *rest, dtype=tensor.dtype)
        if tensor.numel():
            padded[: len(tensor)] = tensor.cpu()
        return [part[: shape[0]] for part, shape in zip(self._gathered(padded), shapes, strict=True)]

    def _reduced(self, values: list[float], operation: Any) -> list[float]:
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return [float(value) for value in tensor]

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return parts


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized()


def connect_alone() -> None:
    """Connect this process as a group of one, unless it is connected."""
    if not _connected():
        dist.init_process_group(_backend(), store=HashStore(), rank=0, world_size=1)


def disconnect() -> None:
    """Leave the process group."""
    if _connected():
        dist.destroy_process_group()


@contextmanager
def join(place: Place) -> Iterator[None]:
    """Connect with the other processes within the context; see ``villa.distributed.joining.joined``."""
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    store, watch = _connect(place)
    kind, code = "done", 0
    try:
        with _silent() if place.rank else ExitStack():
            yield
    except Interrupted as interrupted:
        kind, code = "signal", interrupted.number
        raise _first_cause(interrupted, place, store, watch) from None
    except (VillaError, RuntimeError) as error:
        kind, code = "failed", getattr(error, "exit_code", 1)
        raise _first_cause(error, place, store, watch) from None
    except BaseException:
        kind, code = "failed", 1
        raise
    finally:
        watch.leave(kind, code)
        disconnect()
        if kind != "done":
            _wait_for_others(store, place, watch.ended())
        watch.stop()


def _first_cause(error: BaseException, place: Place, store: Store, watch: Watch) -> BaseException:
    """Return the exception to raise for an error that another process may have caused; only one process reports it."""
    of_connection = isinstance(error, RuntimeError) and _is_of_connection(error)
    end = watch.ended(_VERDICT if of_connection else 0.0)
    if end is not None and end.kind == "lost":
        error = watch.lost(end)
        if end.rank == 0:  # it hosted the store
            return error
    elif end is not None and end.kind == "signal" and not isinstance(error, VillaError):
        return Interrupted(end.code)
    elif of_connection:
        if end is not None or _failed_elsewhere(store):
            return SystemExit(ConfigError.exit_code if end is None else end.code)
        error = ConnectionLostError(
            f"process {place.rank} of {place.world_size} has lost another one, which ended or cannot be reached "
            f"({one_line(error)[:200]}); go on with checkpoint.resume=true"
        )
    if isinstance(error, VillaError) and not _first_to_fail(store):
        return SystemExit(error.exit_code)
    return error


def _connect(place: Place) -> tuple[Store, Watch]:
    """Connect to the others in a thread, so that this one can still receive signals."""
    met: list[tuple[Store, Watch]] = []
    problems: list[Exception] = []

    def meet() -> None:
        try:
            store = _common_store(place)
            notes = PrefixStore("villa", store)
            watch = Watch(place, notes)
            met.append((notes, watch))
            if watch.ended() is None:
                group = PrefixStore("group", store)
                dist.init_process_group(_backend(), store=group, rank=place.rank, world_size=place.world_size)
        except (RuntimeError, ValueError, OSError) as error:
            problems.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join()
    if not _connected():
        raise _not_met(place, next(iter(problems), None), met[0][1] if met else None)
    return met[0]


def _common_store(place: Place) -> Store:
    """Return the store of rank 0 or of torchrun; ``Watch`` waits for all processes and reports missing ones."""
    limit = timedelta(seconds=place.patience)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store: Store = next(rendezvous("env://", place.rank, place.world_size, timeout=limit))[0]
        return store
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, None, place.rank == 0, limit, wait_for_workers=False)


def _not_met(place: Place, problem: Exception | None, watch: Watch | None) -> BaseException:
    """Return the exception to raise when connecting failed, perhaps because another process ended."""
    end = watch.ended(_VERDICT) if watch else None
    if watch and end:
        return watch.lost(end) if end.kind == "lost" else SystemExit(end.code)
    return ConfigError(
        f"process {place.rank} of {place.world_size} cannot meet the others at {os.environ['MASTER_ADDR']}:"
        f"{os.environ['MASTER_PORT']}: {one_line(problem)[:200] if problem else 'the attempt ended without an error'}; "
        "start as many as WORLD_SIZE says, with one MASTER_ADDR and a free MASTER_PORT"
    )


def _backend() -> str:
    """Return NCCL for gradients on CUDA, and gloo for messages, which must not wait for the device."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress all output: ranks above 0 would repeat what rank 0 prints."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _is_of_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _first_to_fail(store: Store) -> bool:
    """Record that this process has failed; return whether it is the first."""
    try:
        return bool(store.add(_FAILED, 1) == 1)
    except RuntimeError:  # the process that hosts the store is gone
        return True


def _failed_elsewhere(store: Store) -> bool:
    try:
        return bool(store.add(_FAILED, 0) > 0)
    except RuntimeError:
        return False


def _wait_for_others(store: Store, place: Place, end: End | None) -> None:
    """After an error, keep the store's host alive until all others, except a lost one, have read from it."""
    lost = end is not None and end.kind == "lost"
    if lost and end is not None and end.rank == 0:
        return
    try:
        left = store.add(_LEFT, 1)
        until = time.monotonic() + _FAREWELL
        while place.rank == 0 and left < place.world_size - lost and time.monotonic() < until:
            time.sleep(0.05)
            left = store.add(_LEFT, 0)
    except RuntimeError:
        pass
