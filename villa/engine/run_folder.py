"""A run's output folder: claimed by one process at a time, and never overwritten by accident."""

from __future__ import annotations

import dataclasses
import hashlib
import os.path
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from villa.checkpoints.layout import CONFIG, FINISHED, SAVED, TRACES
from villa.config.printer import to_yaml
from villa.config.schema import RunConfig
from villa.distributed.environment import Started
from villa.distributed.processes import Processes
from villa.errors import ConfigError, StorageError, one_line
from villa.files import is_at, locked, read_json, room_for, write_json
from villa.registry import LAUNCHERS

_LOCK = ".lock"


@contextmanager
def claim(folder: Path, *, resume: bool, trains: bool = True, processes: Processes | None = None) -> Iterator[Path]:
    """Hold a run's folder for this process, making it if need be; of several processes of a run, the main one does.

    A run that fails before it has anything to show leaves no trace, so that it can simply be started again.

    Args:
        folder: the run's ``output_dir``.
        resume: whether a run that the folder holds may be gone on with.
        trains: whether this is a run that could be gone on with, for the advice.
        processes: those of the run; by default there is one.

    Raises:
        ConfigError: it holds a saved model, or a run that is not to be resumed; another process is using it, or it
            cannot be made.
        StorageError: the disk is full, or somebody has removed or moved the folder meanwhile.
    """
    processes = processes or Processes()
    if not processes.is_main:
        processes.barrier()
        yield folder
        return
    if os.path.isfile(folder / SAVED):  # noqa: PTH113 (pathlib raises for a name that is too long)
        raise ConfigError(f"output_dir '{folder}' holds a saved model ({SAVED}); give another output_dir")
    with _locked(folder):
        used = refuse_used(folder, resume=resume, trains=trains)
        try:
            with _kept(folder):
                processes.barrier()
                yield folder
        except BaseException:
            if used is None and _names(folder) <= {_LOCK, CONFIG}:
                (folder / CONFIG).unlink(missing_ok=True)
            raise
        finally:
            if _names(folder) == {_LOCK}:
                (folder / _LOCK).unlink()
                folder.rmdir()


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Say in one line that the disk is full, or that the folder is not there any more."""
    place = folder.absolute()
    held = os.open(place, os.O_RDONLY | os.O_DIRECTORY)  # as long as it is open, no other folder looks the same

    def check(error: Exception | None = None) -> None:
        if not is_at(held, place):
            reason = f" ({one_line(error)})" if error else ""
            raise StorageError(
                f"output_dir '{folder}' was removed or moved while the run wrote to it{reason}; start again, or move "
                "it back and go on with checkpoint.resume=true"
            ) from error

    try:
        yield
        check()
    except StorageError:
        raise
    except Exception as error:
        check(error)
        with room_for(folder):
            raise
    finally:
        os.close(held)


def _names(folder: Path) -> set[str]:
    """What a folder holds; nothing if it is gone."""
    with suppress(FileNotFoundError):
        return {path.name for path in folder.iterdir()}
    return set()


def refuse_used(folder: Path, *, resume: bool, trains: bool = True) -> str | None:
    """Return the name of something that shows that a folder holds a run, or None; see ``claim`` for the rest."""
    used = next((name for name in TRACES if os.path.exists(folder / name)), None)  # noqa: PTH110 (as above)
    if used is not None and not resume:
        advice = "set checkpoint.resume=true to go on with it, or give" if trains else "give"
        raise ConfigError(f"output_dir '{folder}' already holds a run ({used}); {advice} another output_dir")
    return used


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(locked(folder / _LOCK, wait=False))
            held = stack.pop_all()
    except BlockingIOError:
        started = Started.read(os.environ)
        hint = (
            ""
            if started is None
            else (
                f" ({started.program} has started {started.count}, each a run of its own: distributed.strategy=ddp "
                "makes them one)"
            )
        )
        raise ConfigError(
            f"output_dir '{folder}' is in use by another process{hint}; wait for it or give another one"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"output_dir '{folder}' cannot be used: {one_line(error)}; give another one") from error
    with held:
        yield


def saved_yaml(config: RunConfig) -> str:
    """The recipe as it is saved: the same whether the run was resumed or not, and wherever it takes place."""
    checkpoint = dataclasses.replace(config.checkpoint, resume=False)
    return to_yaml(dataclasses.replace(config, checkpoint=checkpoint, launcher=LAUNCHERS.get("inline").Config()))


def mark_finished(config: RunConfig) -> None:
    """Say that the run is done."""
    write_json(Path(config.output_dir) / FINISHED, {"recipe": _recipe(config)})


def is_finished(config: RunConfig) -> bool:
    """Whether the run's folder says that it was done, by the recipe as it is now.

    Raises:
        DataError: the note is damaged.
    """
    path = Path(config.output_dir) / FINISHED
    if not path.is_file():
        return False
    return bool(read_json(path, "note of a finished run", "remove it") == {"recipe": _recipe(config)})


def _recipe(config: RunConfig) -> str:
    return hashlib.sha256(saved_yaml(config).encode()).hexdigest()
