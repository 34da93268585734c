"""Write a folder completely or not at all, without losing anything that someone else put there."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from villa.checkpoints.files import file_problem, read_manifest, write_manifest
from villa.checkpoints.layout import SAVED
from villa.errors import CheckpointError, VillaError, one_line
from villa.files import from_home, fsync


@contextmanager
def published(target: Path, update: int, manifest: str = SAVED) -> Iterator[Path]:
    """Yield an empty folder beside ``target``, which replaces it, with a manifest, when the block succeeds.

    Args:
        target: absent, empty, or a folder published before in which nothing was added or changed since.
        update: update for the manifest.
        manifest: name of the manifest.

    Raises:
        CheckpointError: the folder holds something else, or cannot be written.
    """
    target = from_home(target).absolute()
    refuse_foreign(target, manifest)
    token = secrets.token_hex(4)
    temporary, old = (target.with_name(f".{target.name}.{token}.{kind}") for kind in ("saving", "replaced"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        write_manifest(temporary, update, manifest)
        refuse_foreign(target, manifest)  # writing may have taken minutes
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        fsync(target.parent)
    except VillaError:
        raise
    except Exception as error:  # transformers, safetensors and the system raise their own for a full disk
        raise CheckpointError(f"'{target}' cannot be written: {one_line(error)}; choose another folder") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def refuse_foreign(target: Path, manifest: str = SAVED) -> None:
    """Refuse a folder that contains anything but unchanged files of its manifest.

    Raises:
        CheckpointError: naming the first such file.
    """
    try:
        if not target.exists():
            return
        if not target.is_dir():
            raise CheckpointError(f"'{target}' is a file; give a folder")
        present = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
        if not present and not any(target.iterdir()):
            return
        written = read_manifest(target, manifest)[1] if (target / manifest).is_file() else {}
        foreign = sorted(present - written.keys() - {manifest}) or [
            name for name, expected in written.items() if name in present and file_problem(target, name, expected)
        ]
    except OSError as error:
        raise CheckpointError(f"'{target}' cannot be read: {one_line(error)}; choose another folder") from error
    if foreign or not written:
        what = f"'{foreign[0]}', which was not written, or was changed since" if foreign else "other folders"
        raise CheckpointError(f"'{target}' is not overwritten: it holds {what}; choose another folder or move it away")
