"""Tensors in states and files: copy them, find shared memory, read safetensors, check archives."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

_Identity = tuple[Any, ...]


def unshared(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into contiguous tensors that share no memory, as safetensors requires, and aliases.

    Returns:
        The tensors by name, and for every other name (a tied weight) the name of the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[_Identity, str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        identity = _identity(tensor)
        if tensor.numel() and first.setdefault(identity, name) != name:
            aliases[name] = first[identity]
            continue
        contiguous = tensor.detach().contiguous()
        storage = contiguous.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != contiguous.nbytes:
            contiguous = contiguous.clone()  # part of a storage, or a view of one that is saved already
        storages.add(contiguous.untyped_storage().data_ptr())
        tensors[name] = contiguous
    return tensors, aliases


def staged(value: Any) -> Any:
    """Copy nested dicts, lists and tuples with their tensors into main memory; tied weights stay tied."""
    return _staged(value, {})


def _staged(value: Any, made: dict[_Identity, Tensor]) -> Any:
    if isinstance(value, Tensor):
        identity = _identity(value)
        if not value.numel() or identity not in made:
            made[identity] = value.detach().to("cpu", copy=True)
        return made[identity]
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _staged(item, made)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_staged(item, made) for item in value)
    return value


def _identity(tensor: Tensor) -> _Identity:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def parameter_indices(groups: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Map the name of each parameter in an optimiser's state to its index."""
    return {n: i for group in groups for n, i in zip(group["names"], group["params"], strict=True)}


def named_parameters(optimizer: Optimizer) -> dict[str, Parameter]:
    """Name to parameter of an optimiser's groups: this process's parts, whatever a strategy has put together by now."""
    return {n: p for group in optimizer.param_groups for n, p in zip(group["names"], group["params"], strict=True)}


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, including the aliases of tied weights in our checkpoints.

    The library checks the header against the size of the file.

    Raises:
        ValueError: the aliases do not fit the tensors.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)
        aliases = json.loads((content.metadata() or {}).get("aliases", "{}"))
    if not isinstance(aliases, dict) or not all(isinstance(name, str) for name in aliases.values()):
        raise ValueError("its 'aliases' do not map names to names")
    unknown = sorted({*aliases.values()} - weights.keys()) + sorted(aliases.keys() & weights.keys())
    if unknown:
        raise ValueError(f"its 'aliases' do not fit its tensors: '{unknown[0]:.80}'")
    return weights | {alias: weights[name] for alias, name in aliases.items()}


def check_archive(file: Path) -> None:
    """Verify an archive of ``torch.save``: torch itself checks neither checksums nor the sizes of packed members.

    Files older than torch's archive format have neither and are not checked.

    Raises:
        ValueError: a member is damaged, or claims more bytes than the file has.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > file.stat().st_size:
            raise ValueError("what is in it claims more bytes than the file has")
        for member in members:
            if not member.CRC:  # torch was told to leave checksums out
                continue
            with archive.open(member) as content:  # verifies the checksum at the end
                while content.read(1 << 22):
                    pass
