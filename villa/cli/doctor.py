"""``villa_run doctor``: what is installed, on which machine, and what a recipe would miss."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement

from villa.config import RunConfig, load_stages
from villa.datasets.cache_folder import cache_root, entries
from villa.errors import VillaError
from villa.registry import SHIFTS, expand_shifts

#: Packages whose versions matter most for results.
_PACKAGES = ("villa", "torch", "transformers", "fairscale", "tokenizers", "numpy", "pillow", "pyarrow", "lmdb")


def report(arguments: Sequence[str]) -> str:
    """Return what villa finds on this machine; with a recipe's arguments, also what that lacks.

    Raises:
        ConfigError: the recipe cannot be used.
    """
    lines = [f"Python {platform.python_version()} on {platform.platform()}"]
    lines += ["", "packages:", *(f"  {name:14} {_version(name) or 'not installed'}" for name in _PACKAGES)]
    lines += ["", "optional packages:", *_extras()]
    lines += ["", "devices:", *(f"  {line}" for line in _devices())]
    lines += ["", "folders:", *_folders()]
    if arguments:
        lines += ["", "recipe:", *(f"  {line}" for line in _recipe(arguments))]
    return "\n".join(lines) + "\n"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def extras() -> dict[str, list[Requirement]]:
    """Return what each extra of villa needs; nothing if villa is not installed."""
    found: dict[str, list[Requirement]] = {}
    try:
        metadata = importlib.metadata.metadata("villa")
    except importlib.metadata.PackageNotFoundError:
        return found
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist") or ()]
    for extra in metadata.get_all("Provides-Extra") or ():
        found[extra] = [r for r in needed if r.marker and r.marker.evaluate({"extra": extra})]
    return found


def missing(extra: str) -> list[str]:
    """Return the packages of an extra that are not installed."""
    return [requirement.name for requirement in extras().get(extra, ()) if _version(requirement.name) is None]


def _extras() -> Iterator[str]:
    for extra in extras():
        absent = missing(extra)
        state = f"missing: {', '.join(absent)} (pip install 'villa[{extra}]')" if absent else "installed"
        yield f"  {extra:14} {state}"


def _devices() -> Iterator[str]:
    import torch

    threads = f"{os.cpu_count()} CPU threads, of which torch takes {torch.get_num_threads()}"
    yield f"cpu: {threads}; {torch.backends.cpu.get_cpu_capability()}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if not torch.cuda.is_available():
        yield "no CUDA device" if torch.version.cuda else "no CUDA device: this is a build of torch for CPUs"


def _folders() -> Iterator[str]:
    root = cache_root()
    size = sum(entry.size for entry in entries(root))
    yield f"  cache          {root}: {size / 2**20:.1f} MiB (villa_cache lists and prunes)"
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    yield f"  hub            {hub}{'' if hub.is_dir() else ' (not there)'}"
    yield f"  here           {shutil.disk_usage('.').free / 2**30:.1f} GiB free"


def _recipe(arguments: Sequence[str]) -> Iterator[str]:
    for stage in load_stages(arguments):
        config = stage.config
        yield f"{config.name}: {config.model.name}, {config.dataset.name}, {config.trainer.name}"
        for extra, packages in needed_extras(config).items():
            absent = [name for name in missing(extra) if not packages or name in packages]
            state = f"missing {', '.join(absent)} (pip install 'villa[{extra}]')" if absent else "installed"
            yield f"needs villa[{extra}]: {state}"
        try:
            _open(config)
            yield "its data are there"
        except VillaError as error:
            yield str(error).splitlines()[0]


def needed_extras(config: RunConfig) -> dict[str, list[str]]:
    """Return the extras that a recipe uses, each with the packages that it needs of it; none named are all."""
    grid = getattr(config.dataset, "regions", None) == "grid"
    packages = {"mlflow": "mlflow-skinny", "wandb": "wandb", "trackio": "trackio"}
    trackers = [package for name, package in packages.items() if name in config.logging.trackers]
    shifts = expand_shifts(config.robustness.shifts) if config.run_type == "robustness" else []
    required = [SHIFTS.get(name).requires for name in shifts]
    uses = {
        "demo": config.dataset.name == "easy_vqa" or grid,
        "lora": bool(getattr(config.model, "lora_rank", None)),
        "trackers": bool(trackers),
        **{extra: True for _, extra in filter(None, required)},
        "probe": config.run_type == "probe",
    }
    return {extra: trackers if extra == "trackers" else [] for extra, used in uses.items() if used}


def _open(config: RunConfig) -> None:
    """Open the data as far as that extracts no features."""
    from villa.registry import DATASETS

    data = DATASETS.get(config.dataset.name)(config.dataset)
    data.facts()
    if hasattr(config.dataset, "root"):  # released databases and files, whose features are there
        data.split("train" if "train" in config.run_type else "test")
