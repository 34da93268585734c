"""Upload a saved folder to the model hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from villa.errors import CheckpointError, ConfigError, one_line

#: Files of an earlier upload that would be read, or mislead, beside those of another model.
_REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.bin", "villa/*"]
_NAME = re.compile(r"(?=.{3,96}$)\w[\w.-]*/\w[\w.-]*", re.ASCII)


def check_name(name: str) -> None:
    """Check a name on the hub.

    Raises:
        ConfigError: it is not ``owner/name``.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"'{name}' is no name on the hub; give owner/name, of letters, digits, '-', '_' and '.'")


def license_of(name: str | None) -> str | None:
    """Return the licence of a model on the hub, as far as it can be asked for; None if not."""
    from huggingface_hub import HfApi

    if name is None:
        return None
    try:
        data: Any = HfApi().model_info(name, timeout=5).card_data
    except Exception:  # of the hub's client or the network: then it is not known
        return None
    found = None if data is None else data.get("license")
    return found if isinstance(found, str) else None


def sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of the files below a folder in bytes, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def upload(folder: Path, name: str, *, public: bool, revision: str | None, message: str) -> str:
    """Upload a folder as one commit; make the repository, and the branch, if need be.

    Files of weights and of villa's own folder that an earlier upload has left are removed by the same commit.

    Args:
        folder: a saved folder.
        name: ``owner/name``.
        public: whether everybody may see the repository.
        revision: branch; None for the main one.
        message: message of the commit.

    Returns:
        The address of the model's page.

    Raises:
        CheckpointError: the hub refuses it or cannot be reached, or the repository is there and public although a
            private one is wanted, or the other way round.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _one_line(name):
        page = api.create_repo(name, private=not public, exist_ok=True)
        private = api.model_info(name).private
    if private is public:
        now, wanted = ("private", "public") if public else ("public", "private")
        advice = "leave --public out" if public else "add --public (public=True) if everybody may see it"
        raise CheckpointError(
            f"'{name}' exists and is {now}, and a {wanted} one is wanted; {advice}, or make it {wanted} on the hub"
        )
    with _one_line(name):
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message=message, delete_patterns=_REPLACED
        )
    return str(page) if revision is None else f"{page}/tree/{revision}"


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line."""
    from huggingface_hub import errors, get_token

    try:
        yield
    except Exception as error:  # of the client, the network or the disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.OfflineModeIsEnabled):
            advice = "unset HF_HUB_OFFLINE"
        elif status in (401, 403) and get_token() is None:
            advice = "log in with 'hf auth login', or set HF_TOKEN"
        elif status in (401, 403):
            advice = f"its token may not write to {name.partition('/')[0]}; make one that may, and set HF_TOKEN"
        else:
            advice = "try again: what has arrived is not sent twice"
        raise CheckpointError(f"'{name}' cannot be uploaded: {one_line(error)}; {advice}") from error
