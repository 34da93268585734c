"""Checkpoint shards: every process writes the tensors that it has, and any process reads those that it needs.

The files have the safetensors layout of ``torch.distributed.checkpoint``; its default layout holds a pickle, which is
never read. Each process decides alone what it writes, so that none waits for another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from villa.checkpoints.layout import INDEX, SHARDS
from villa.checkpoints.tensors import local_part, parameter_indices, staged, unshared
from villa.errors import CheckpointError, ConfigError, reading
from villa.files import write_json
from villa.json_values import read_own
from villa.share import Share

try:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
except ImportError as _error:  # torch before 2.9
    raise ConfigError(
        f"checkpoint.sharded: torch {torch.__version__} has no shards in the safetensors layout; install 2.9 or later, "
        "or set checkpoint.sharded=false"
    ) from _error

#: Prefixes of the names of weights, and of an optimiser's state.
MODEL_STATE, OPTIMIZER_STATE = "model.", "optimizer."
#: Parts of the updater's state with tensors per weight; they are also the first part of the names of these.
KEPT = ("trainer", "average")
#: Prefix of the names of the average that ``training.ema`` keeps.
AVERAGE_STATE = "average.ema."

_FORMAT = 1


@dataclass(frozen=True)
class RankPart:
    """The tensors of a checkpoint that one process writes.

    Attributes:
        rank: rank of the process.
        plan: which part of which tensor it writes.
        tensors: its part of each tensor, by name.
        index: shapes of all tensors of the checkpoint, and aliases of tied ones.
    """

    rank: int
    plan: SavePlan
    tensors: Mapping[str, Tensor]
    index: Mapping[str, Any]

    def write(self, folder: Path) -> list[Path]:
        """Write the part into the folder of a checkpoint; return its files."""
        shards = folder / SHARDS
        shards.mkdir(exist_ok=True)
        writer = HuggingFaceStorageWriter(str(shards), save_distributed=True)
        *_, plan = writer.prepare_global_plan([SavePlan([])] * self.rank + [self.plan])  # names the file by rank
        written = writer.write_data(plan, _Prepared(self.tensors)).wait()
        if self.rank == 0:
            write_json(folder / INDEX, dict(self.index))
        return sorted({shards / result.storage_data.relative_path for result in written})


class _Prepared(DefaultSavePlanner):
    """A save planner that supplies tensors collected before."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the collected tensor of an item."""
        return self._tensors[write_item.index.fqn]


def part_of(
    model: nn.Module,
    optimizer: Mapping[str, Tensor],
    share: Share,
    *,
    copy: bool,
    kept: Mapping[str, Tensor] | None = None,
) -> RankPart:
    """Collect the tensors that this process writes, without communication.

    Args:
        model: the model to save. A tensor that every process has is written by one of them.
        optimizer: tensors of its optimiser by name.
        share: rank and number of processes.
        copy: copy the tensors into main memory, so that training may continue.
        kept: tensors that are kept per weight, as named by ``split_kept``.
    """
    state = {MODEL_STATE + name: value for name, value in model.state_dict().items()}
    buffers = state.keys() - {MODEL_STATE + name for name, _ in model.named_parameters(remove_duplicate=False)}
    state |= {OPTIMIZER_STATE + name: value for name, value in optimizer.items()}
    state |= kept or {}
    local, aliases = unshared({name: local_part(value) for name, value in state.items()})
    whole = {name: value for name, value in local.items() if not isinstance(state[name], DTensor)}
    owners = _owners(whole, buffers, share.world_size)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    own = {name: state[name] for name in local if owners.get(name, share.rank) == share.rank}
    planner.set_up_planner(own, is_coordinator=True)
    filled = {name for name, part in local.items() if part.numel() or name in owners or share.rank == 0}
    items = [item for item in planner.create_local_plan().items if item.index.fqn in filled]  # some have no rows
    tensors = {item.index.fqn: local[item.index.fqn] for item in items}
    index = {
        "format": _FORMAT,
        "processes": share.world_size,
        "shapes": {name: list(state[name].shape) for name in local},
        "aliases": aliases,
    }
    return RankPart(share.rank, SavePlan(items), staged(tensors) if copy else tensors, index)


def _owners(tensors: Mapping[str, Tensor], main_only: Collection[str], count: int) -> dict[str, int]:
    """Assign each tensor that all processes have, largest first, to the process that has least to write.

    The main process writes buffers, as in an unsharded checkpoint, because they may differ between processes.
    """
    load, owners = [0] * count, {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        owners[name] = 0 if name in main_only else load.index(min(load))
        load[owners[name]] += tensors[name].nbytes
    return owners


def split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split an optimiser's state into a small rest and tensors by name, ``<parameter>.<state>``."""
    names = {index: name for name, index in parameter_indices(state["param_groups"]).items()}
    small: dict[int, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for index, kept in state["state"].items():
        large = {key: value for key, value in kept.items() if isinstance(value, Tensor) and value.dim() > 0}
        small[index] = {key: value for key, value in kept.items() if key not in large}
        tensors |= {f"{names[index]}.{key}": value for key, value in large.items()}
    return {**state, "state": small}, tensors


def join_optimizer(state: Mapping[str, Any], shards: Shards, like: Mapping[str, Tensor] | None) -> None:
    """Put an optimiser's tensors back into the state that ``split_optimizer`` left.

    Args:
        state: the training state, changed in place.
        shards: the shards with the tensors.
        like: parameters by name; see ``Shards.read``.

    Raises:
        CheckpointError: state and shards do not belong together.
    """
    stored = [name.removeprefix(OPTIMIZER_STATE).rpartition(".") for name in shards.names(OPTIMIZER_STATE)]
    parameters = {f"{name}.{key}": like[name] for name, _, key in stored if like and name in like}
    tensors = shards.read(OPTIMIZER_STATE, parameters)
    with shards.broken():
        optimizer = state["updater"]["optimizer"]
        indices = parameter_indices(optimizer["param_groups"])
        for name, _, key in stored:
            optimizer["state"][indices[name]][key] = tensors[f"{name}.{key}"]


def split_kept(updater: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split an updater's state into what is small, and what is kept per weight: ``<part>.<word>.<parameter>``."""
    small, tensors = dict(updater), dict[str, Tensor]()
    for part in (part for part in KEPT if part in updater):
        kept = updater[part]["weights"]
        tensors |= {f"{part}.{word}.{name}": value for word, of in kept.items() for name, value in of.items()}
        small[part] = {**updater[part], "weights": {word: {} for word in kept}}
    return small, tensors


def join_kept(state: Mapping[str, Any], shards: Shards, like: Mapping[str, Tensor] | None) -> None:
    """Put the tensors back into the state that ``split_kept`` has left; see ``join_optimizer``.

    Raises:
        CheckpointError: they do not belong together.
    """
    with shards.broken():
        kept = [(part, state["updater"][part]["weights"]) for part in KEPT if part in state["updater"]]
        for part, weights in kept:
            weights |= {word: shards.read(f"{part}.{word}.", like) for word in weights}


class Shards:
    """The tensors of a sharded checkpoint.

    Args:
        folder: folder of the checkpoint.

    Raises:
        CheckpointError: the shards cannot be read, or a part of a tensor is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with self.broken():
            index = read_own(folder / INDEX)
            if index["format"] != _FORMAT:
                raise ValueError(f"its format is {index['format']}, this villa reads {_FORMAT}")
            self.shapes = {name: torch.Size(shape) for name, shape in index["shapes"].items()}
            self.aliases: dict[str, str] = dict(index["aliases"])
            wrong = [*({*self.aliases.values()} - self.shapes.keys()), *(self.aliases.keys() & self.shapes.keys())]
            if wrong:
                raise ValueError(f"its 'aliases' do not fit its tensors: {wrong[0]!r:.80}")
            self._reader = HuggingFaceStorageReader(str(folder / SHARDS))
            self._metadata = self._reader.read_metadata()
            self._stored: dict[str, Any] = dict(self._metadata.state_dict_metadata)
            self._check_parts()

    def names(self, prefix: str) -> list[str]:
        """Return the names of the stored tensors that begin with ``prefix``."""
        return [name for name in self.shapes if name.startswith(prefix)]

    def read(self, prefix: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Read the tensors whose names begin with ``prefix`` to the CPU, by the rest of their names.

        Args:
            prefix: ``MODEL_STATE``, ``OPTIMIZER_STATE``, or that of what is kept per weight.
            like: tensors by the rest of their names. For one that is sharded, only this process's part is read, to the
                same device.

        Raises:
            CheckpointError: a file was damaged after the checkpoint was verified.
        """
        with self.broken():
            made = {name: self._empty(name, (like or {}).get(name.removeprefix(prefix))) for name in self.names(prefix)}
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.set_up_planner(dict(made), self._metadata, is_coordinator=True)
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            self._reader.read_data(planner.create_local_plan(), planner).wait()
            made |= {alias: made[name] for alias, name in self.aliases.items() if alias.startswith(prefix)}
        return {name.removeprefix(prefix): value for name, value in made.items()}

    def _empty(self, name: str, like: Tensor | None) -> Tensor:
        dtype = self._stored[name].properties.dtype
        if isinstance(like, DTensor) and like.shape == self.shapes[name]:
            return torch.empty_like(like, dtype=dtype, requires_grad=False)
        return torch.empty(self.shapes[name], dtype=dtype)

    def _check_parts(self) -> None:
        for name, shape in self.shapes.items():
            stored = self._stored[name]
            if stored.size != shape or not _tile(stored.chunks, shape):
                raise ValueError(f"a part of '{name}' is missing")

    def broken(self) -> AbstractContextManager[None]:
        """Return a context that turns the errors of damaged files into one line."""
        return reading(f"the shards in '{self.folder}' cannot be read", "use another checkpoint", CheckpointError)


def _tile(chunks: Sequence[Any], shape: torch.Size) -> bool:
    """Return whether chunks along one dimension cover a tensor exactly, so that no element stays unread."""
    cut = next((d for d, size in enumerate(shape) if any(chunk.sizes[d] != size for chunk in chunks)), None)
    if cut is None:  # whole
        return len(chunks) == 1 and not any(chunks[0].offsets)
    end = 0
    for chunk in sorted(chunks, key=lambda chunk: (chunk.offsets[cut], chunk.sizes[cut])):
        others = [(chunk.offsets[d], chunk.sizes[d]) for d in range(len(shape)) if d != cut]
        if others != [(0, size) for d, size in enumerate(shape) if d != cut] or chunk.offsets[cut] != end:
            return False
        end += chunk.sizes[cut]
    return bool(end == shape[cut])
