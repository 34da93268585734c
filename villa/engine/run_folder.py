"""A run's output folder, claimed by one process at a time and never overwritten by accident."""

from __future__ import annotations

import dataclasses
import hashlib
import os.path
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from villa.checkpoints.layout import CONFIG, FINISHED, SAVED, TRACES
from villa.config.options import recipe_options
from villa.config.printer import to_yaml
from villa.config.schema import VARIANTS, RunConfig
from villa.config.values import Origin
from villa.config.yaml_text import parse
from villa.distributed.environment import Started
from villa.distributed.processes import Processes
from villa.errors import ConfigError, StorageError, one_line
from villa.files import is_at, locked, read_json, room_for, write_json
from villa.registry import LAUNCHERS

_LOCK = ".lock"


@contextmanager
def claim(folder: Path, *, resume: bool, trains: bool = True, processes: Processes | None = None) -> Iterator[Path]:
    """Lock a run's folder while the context is open, creating it if needed; only rank 0 of a run does.

    A run that fails before it has written anything leaves no trace, so that it can simply be started again.

    Args:
        folder: the run's ``output_dir``.
        resume: whether to resume a run that the folder holds.
        trains: whether this run could be resumed, for the advice in messages.
        processes: the processes of the run; a single one by default.

    Raises:
        ConfigError: the folder holds a saved model or a run that is not to be resumed, is in use by another process, or
            cannot be created.
        StorageError: the disk is full, or the folder was removed or moved in the meantime.
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
    """Report a full disk or a folder that disappears within the context in one line."""
    place = folder.absolute()
    held = os.open(place, os.O_RDONLY | os.O_DIRECTORY)  # while it is open, its inode is not reused

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
    """Return the names of a folder's entries; an empty set if it is gone."""
    with suppress(FileNotFoundError):
        return {path.name for path in folder.iterdir()}
    return set()


def refuse_used(folder: Path, *, resume: bool, trains: bool = True) -> str | None:
    """Return the name of an entry that shows that the folder holds a run, or None; raises as ``claim`` does."""
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
    """Return the recipe as saved, independent of resuming and of the machine."""
    checkpoint = dataclasses.replace(config.checkpoint, resume=False)
    return to_yaml(dataclasses.replace(config, checkpoint=checkpoint, launcher=LAUNCHERS.get("inline").Config()))


def changes(before: str, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the options that differ between a saved recipe and another one, as values before and now.

    Options missing from an older version's recipe have their defaults: that version behaved accordingly.
    """
    now, old = _values(saved_yaml(config)), _values(before)
    options = recipe_options({section: type(getattr(config, section)) for section in VARIANTS})
    for key in now.keys() - old.keys():
        if (option := options.get(key)) is not None and option.default != MISSING:
            old[key] = option.default
    return {k: (old.get(k), now.get(k)) for k in sorted({*old, *now}) if old.get(k) != now.get(k)}


def _values(recipe: str) -> dict[str, Any]:
    """Return the values of a saved recipe by dotted key, without importing what it names."""
    return {key: value.data for key, value in parse(recipe, lambda line: Origin(CONFIG, line)).items()}


def mark_finished(config: RunConfig) -> None:
    """Record that the run has finished."""
    write_json(Path(config.output_dir) / FINISHED, {"recipe": _digest(saved_yaml(config))})


def is_finished(config: RunConfig) -> bool:
    """Return whether the run's folder records that this very recipe has finished.

    A recipe that an older version saved is compared by the options that it has.

    Raises:
        DataError: the record is damaged.
    """
    folder = Path(config.output_dir)
    if not (folder / FINISHED).is_file():
        return False
    recorded = read_json(folder / FINISHED, "note of a finished run", "remove it")
    if recorded == {"recipe": _digest(saved_yaml(config))}:
        return True
    try:
        recipe = (folder / CONFIG).read_text(encoding="utf-8")
        return bool(recorded == {"recipe": _digest(recipe)} and not changes(recipe, config))
    except (OSError, ValueError, ConfigError):  # the record is of a recipe that is no longer there
        return False


def _digest(recipe: str) -> str:
    return hashlib.sha256(recipe.encode()).hexdigest()
