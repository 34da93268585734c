"""Examples a second of the database readers with collation, relative to the way of the released reader.

    python tools/benchmarks/readers.py                # 256 images of 10 to 100 boxes, one core

Writes databases of random examples to a temporary folder and reads batches of random examples, by villa and by the
released recipe: every value decoded in full (msgpack-numpy) or by ``numpy.load``, widened, its area column
appended, then padded in a loop. Both take turns, round after round, and the best round of each counts, in seconds of
CPU time on one core, so that a busy machine does not matter. What they read is compared once, exactly. The column
``limit`` is the rate at which features that lie ready are decompressed, widened and padded, and nothing else: the
processor and its memory set it. Needs the package msgpack-numpy.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import lmdb
import lz4.frame
import msgpack
import msgpack_numpy
import numpy as np
import torch
from deflate import deflate_decompress
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from villa.datasets.base import Example
from villa.datasets.collation import collate, empty, reading
from villa.datasets.uniter.database_split import Pair
from villa.datasets.uniter.image_lmdb import BoxSelection, ImageStore
from villa.datasets.uniter.text_lmdb import TextStore
from villa.datasets.uniter.writers import ImageDatabaseWriter, TextDatabaseWriter

META = {"CLS": 101, "SEP": 102, "MASK": 103, "v_range": [106, 28996]}

#: Reads the examples of these ids; returns the padded word-pieces, features and boxes.
Read = Callable[[Sequence[str]], tuple[Tensor, Tensor, Tensor]]


def write(folder: Path, examples: int, dim: int, classes: int) -> None:
    """Write a text database and image databases, with and without compression, of examples like those of VQA."""
    values = np.random.default_rng(0)
    texts = TextDatabaseWriter(folder / "text.db", META)
    images = [
        ImageDatabaseWriter(folder / "images", BoxSelection(compressed=compressed)) for compressed in (False, True)
    ]
    for number in range(examples):
        name, rows = f"image_{number:012}.npz", int(values.integers(10, 101))
        # Features follow a ReLU; class distributions have one large entry and many small ones.
        logits = 3 * values.standard_normal((rows, classes), dtype=np.float32)
        labels = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        features = np.maximum(values.standard_normal((rows, dim), dtype=np.float32), 0)
        corners = np.sort(values.random((rows, 2, 2), dtype=np.float32), 1).reshape(rows, 4)
        boxes = np.concatenate([corners, corners[:, 2:] - corners[:, :2]], 1)
        for writer in images:
            writer.add(name, features, boxes, np.full(rows, 0.5, np.float32), labels)
        ids = values.integers(106, 28996, int(values.integers(4, 16))).tolist()
        example = {"input_ids": ids, "img_fname": name, "target": {"labels": [1], "scores": [1.0]}}
        texts.add(str(number), example, len(ids), name)
    for finished in (texts, *images):
        finished.close()


def villa_reader(folder: Path, boxes: BoxSelection) -> Read:
    """The readers and the collation of villa. The model makes the area column."""
    pair = Pair(TextStore(folder / "text.db"), ImageStore(folder / "images", boxes))
    texts, images, image_rows = pair.text, pair.images, pair.image_rows

    def example(id: str) -> Example:
        row = int(id)  # as they were written
        text = texts[row]
        features, norm_bb = images[image_rows[row][0]]
        return Example(id, torch.tensor([texts.cls_id, *text["input_ids"], texts.sep_id]), None, features, norm_bb)

    def read(ids: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        rows = image_rows.take(np.array([int(id) for id in ids])).values
        with reading(images.counts(rows).tolist()):  # as a data loader does
            batch = collate([example(id) for id in ids])
        assert batch.input_ids is not None
        assert batch.features is not None
        assert batch.boxes is not None
        return batch.input_ids, batch.features, batch.boxes

    return read


def plain_reader(folder: Path, boxes: BoxSelection) -> Read:
    """The recipe of the released reader, written plainly."""
    opened = [
        lmdb.open(str(path), readonly=True, lock=False)
        for path in (folder / "text.db", folder / "images" / boxes.folder())
    ]
    text_data, image_data = (environment.begin(buffers=True) for environment in opened)
    counts = json.loads((folder / "images" / str(boxes.counts_file())).read_text())

    def regions(name: str) -> tuple[Tensor, Tensor]:
        value = image_data.get(name.encode())
        if boxes.compressed:
            arrays = np.load(io.BytesIO(value))
        else:
            arrays = msgpack.unpackb(value, raw=False, object_hook=msgpack_numpy.decode)
        features = torch.tensor(arrays["features"][: counts[name]]).float()
        norm_bb = torch.tensor(arrays["norm_bb"][: counts[name]]).float()
        return features, torch.cat([norm_bb, norm_bb[:, 4:5] * norm_bb[:, 5:]], 1)

    def padded(rows: list[Tensor]) -> Tensor:
        batch = torch.zeros(len(rows), max(len(row) for row in rows), rows[0].shape[1])
        for place, row in enumerate(rows):
            batch[place, : len(row)] = row
        return batch

    def read(ids: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        texts, features, norm_bbs = [], [], []
        for id in ids:
            text = msgpack.unpackb(lz4.frame.decompress(text_data.get(id.encode())), raw=False)
            texts.append(torch.tensor([META["CLS"], *text["input_ids"], META["SEP"]]))
            feature, norm_bb = regions(text["img_fname"])
            features.append(feature)
            norm_bbs.append(norm_bb)
        return pad_sequence(texts, batch_first=True), padded(features), padded(norm_bbs)

    return read


def limit(folder: Path, boxes: BoxSelection) -> Callable[[Sequence[str]], Tensor]:
    """Return a function that decompresses, widens and pads features; everything else was done before."""
    images = ImageStore(folder / "images", boxes)
    stored = [images[row][0] for row in range(len(images))]
    packed = [_deflated(features.numpy().tobytes()) for features in stored] if boxes.compressed else []

    def read(ids: Sequence[str]) -> Tensor:
        rows = [int(id) for id in ids]  # as they were written
        batch = empty(len(rows), max(len(stored[row]) for row in rows), images.dim, dtype=torch.float32)
        for place, padding, row in zip(batch, batch.view(torch.uint8).numpy(), rows, strict=True):
            features, length = stored[row], len(stored[row])
            if packed:
                data = deflate_decompress(packed[row], features.nbytes)
                features = torch.frombuffer(data, dtype=features.dtype).view(features.shape)
            place[:length] = features
            padding[length:].fill(0)
        return batch

    return read


def _deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)  # as in a .npz archive
    return packer.compress(data) + packer.flush()


def equal(one: Read, other: Read, ids: Sequence[str]) -> bool:
    """Whether both read the same, but for the area column."""
    first, second = one(ids), other(ids)
    return all(torch.equal(a, b[..., : a.shape[-1]]) for a, b in zip(first, second, strict=True))


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=256, help="examples in the databases")
    parser.add_argument("--batch", type=int, default=64, help="examples a batch")
    parser.add_argument("--batches", type=int, default=4, help="batches a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dim", type=int, default=2048, help="width of a region feature")
    parser.add_argument("--classes", type=int, default=1601, help="classes of the soft labels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| values | villa: examples/s | released recipe: examples/s | ratio | limit: examples/s | equal |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.examples, options.dim, options.classes)
        for compressed in (False, True):
            compare(Path(folder), BoxSelection(compressed=compressed), options)


def compare(folder: Path, boxes: BoxSelection, options: argparse.Namespace) -> None:
    """Measure both readers on one choice of boxes and print a row."""
    draw = random.Random(0)  # noqa: S311
    villa = villa_reader(folder, boxes)
    # LMDB opens a file once a process: the plain reader has copies of its own.
    plain = plain_reader(copied(folder, boxes), boxes)
    readers: dict[str, Callable[[Sequence[str]], object]] = {
        "villa": villa,
        "plain": plain,
        "limit": limit(folder, boxes),
    }
    best = dict.fromkeys(readers, float("inf"))
    for _ in range(options.rounds):
        batches = [
            [str(draw.randrange(options.examples)) for _ in range(options.batch)] for _ in range(options.batches)
        ]
        for name, read in readers.items():
            started = time.process_time()
            for ids in batches:
                read(ids)
            best[name] = min(best[name], time.process_time() - started)
    rates = {name: options.batches * options.batch / seconds for name, seconds in best.items()}
    same = "yes" if equal(villa, plain, batches[0]) else "NO"
    kind = "compressed" if boxes.compressed else "uncompressed"
    villa_rate, plain_rate, limit_rate = (rates[name] for name in readers)
    ratio = f"{villa_rate / plain_rate:.2f}"
    print(f"| {kind} | {villa_rate:,.0f} | {plain_rate:,.0f} | {ratio} | {limit_rate:,.0f} | {same} |")


def copied(folder: Path, boxes: BoxSelection) -> Path:
    """Copy the databases of a choice of boxes beside themselves."""
    copy = folder / f"copy_{boxes.folder()}"
    shutil.copytree(folder / "text.db", copy / "text.db")
    shutil.copytree(folder / "images" / boxes.folder(), copy / "images" / boxes.folder())
    shutil.copy(folder / "images" / str(boxes.counts_file()), copy / "images")
    return copy


if __name__ == "__main__":
    main()
