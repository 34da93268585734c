"""Seconds and memory that a run needs before its first update on millions of examples.

    python tools/benchmarks/index.py                            # 10 million texts about 4.2 million images
    python tools/benchmarks/index.py --examples 200000 --images 80000

Writes a text database and an image database (of one tiny value each, stored under every key) to a temporary folder, or
to ``--folder``, which is kept and used again. Then it starts twice, each time in a new process: opens the training
split, checks that every image is there, computes the fingerprints of the data, cuts the first epoch by tokens and takes
its first update. The first start makes the indexes, the second one finds them. The proportion of texts and images is
that of the pre-training data of UNITER and VILLA. Peak memory is the largest resident set of the process: with pages of
mapped files, which all processes of a machine share, and without them (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

#: Entries of a transaction.
PUTS = 100_000
META = {"CLS": 101, "SEP": 102, "MASK": 103, "v_range": [106, 28996]}
TEXT, IMAGES = "text.db", "images"
PARTS = ("import", "open", "fingerprint", "first update")


def write(folder: Path, examples: int, images: int) -> None:
    """Write the databases."""
    import lz4.frame
    import msgpack
    import numpy as np

    from villa.datasets.uniter.box_selection import BoxSelection
    from villa.datasets.uniter.writers import _msgpack

    draws = np.random.default_rng(0)
    boxes = BoxSelection()
    arrays = {
        "features": np.ones((10, 4), np.float16),
        "norm_bb": np.tile(np.array([0, 0, 1, 1, 1, 1], np.float16), (10, 1)),
    }
    text = lz4.frame.compress(msgpack.packb({"input_ids": [200] * 12}))
    names = [f"image_{number:09}.npz" for number in range(images)]
    _put(folder / IMAGES / boxes.folder(), names, _msgpack(arrays), {"__keys__": _json_list(names)})
    counts = zip(names, draws.integers(10, 101, images).tolist(), strict=True)
    _write_object(folder / IMAGES / str(boxes.counts_file()), (f'"{name}": {count}' for name, count in counts))
    _put(folder / TEXT, (f"{number:08}" for number in range(examples)), text, {})
    lengths = draws.integers(4, 40, examples).tolist()
    _write_object(folder / TEXT / "id2len.json", (f'"{id:08}": {length}' for id, length in enumerate(lengths)))
    order = draws.permutation(images).tolist()  # texts name images in another order than the database does
    about = (f'"{id:08}": "{names[order[id % images]]}"' for id in range(examples))
    _write_object(folder / TEXT / "txt2img.json", about)
    (folder / TEXT / "meta.json").write_text(json.dumps(META))


def _put(folder: Path, keys: Iterable[str], value: bytes, last: dict[str, bytes]) -> None:
    """Write an environment that has one value under all keys, which are ascending."""
    import lmdb

    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 36, sync=False) as environment:
        with environment.begin(write=True) as transaction:
            for key, data in last.items():
                transaction.put(key.encode(), data)
        for part in _parts(keys):
            with environment.begin(write=True) as transaction, transaction.cursor() as cursor:
                cursor.putmulti([(key.encode(), value) for key in part], append=not last)


def _parts(keys: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for key in keys:
        part.append(key)
        if len(part) == PUTS:
            yield part
            part = []
    yield part


def _json_list(names: list[str]) -> bytes:
    return json.dumps(names).encode()


def _write_object(path: Path, entries: Iterator[str]) -> None:
    with path.open("w") as file:
        file.write("{")
        for number, entry in enumerate(entries):
            file.write(f", {entry}" if number else entry)
        file.write("}")


def start(folder: Path) -> dict[str, float]:
    """Do what a run does before its first update; return seconds, and the peak of the memory in MiB."""
    began, times = time.perf_counter(), [time.process_time()]
    from villa.config.schema import BatchConfig
    from villa.datasets.uniter.pretraining import Pretraining, PretrainingDataConfig

    config = PretrainingDataConfig(root=str(folder), objective="mlm", train_text=[TEXT], train_images=[IMAGES])
    imported = _peak()
    times.append(time.process_time())
    own = [0.0]
    threading.Thread(target=_sample, args=(own,), daemon=True).start()
    data = Pretraining(config)
    split = data.split("train")
    times.append(time.process_time())
    data.fingerprint()
    times.append(time.process_time())
    sampler = split.sampler(BatchConfig(tokens=10240), 0)
    first = sampler.update(sampler.start())
    data.collate([split.draw(index, 0) for index in first[0][:2]])
    times.append(time.process_time())
    parts = dict(zip(PARTS, (after - before for before, after in pairwise(times)), strict=True))
    return {
        "examples": len(split),
        "seconds": time.perf_counter() - began,
        "imports": imported,
        "peak": _peak(),
        "own": max(own),
        **parts,
    }


def _sample(found: list[float]) -> None:
    """Collect, for ever, the resident memory in MiB that is no page of a file."""
    while True:
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        found += [int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")]
        time.sleep(0.02)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Parse the options, write the databases and start twice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--images", type=int, default=4_200_000)
    parser.add_argument("--folder", type=Path, help="keep the databases here, and use them if they are there")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        if not (folder / TEXT / "meta.json").exists():
            write(folder, options.examples, options.images)
        environment = {**os.environ, "VILLA_CACHE": str(Path(temporary) / "cache")}
        for which in ("first start", "next start"):
            command = [sys.executable, __file__, "--start", str(folder)]
            done = subprocess.run(  # noqa: S603 - this file
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            values = json.loads(done.stdout.splitlines()[-1])
            parts = ", ".join(f"{name} {values[name]:.1f}" for name in PARTS)
            print(
                f"{which}: {values['examples']:,} examples, {values['seconds']:.1f} s (CPU seconds: {parts}), peak "
                f"{values['peak']:,.0f} MiB ({values['imports']:,.0f} MiB after the imports), without mapped files "
                f"{values['own']:,.0f} MiB"
            )


if __name__ == "__main__":
    main()
