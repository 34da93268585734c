"""Seconds and memory that a run needs before its first update on millions of JSON lines.

    python tools/benchmarks/jsonl.py                                     # 2 million questions of text alone
    python tools/benchmarks/jsonl.py --lines 300000 --images 300000      # about as many pictures of one folder

Writes the lines (with an id, a question of ordinary length and one of 3,000 answers each) to a temporary folder, or to
``--folder``, which is kept and used again; pictures are hard links to a single small one. Then a new process builds the
vocabulary and the answers, checks the lines of the training split, computes the fingerprint of the data, cuts the first
epoch by tokens and reads its first micro-batch. Memory is what the process holds beyond its imports, without mapped
files (Linux only): after the split was read, and at its peak before the micro-batch is read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

#: Words of the questions, answers, and names in one folder.
WORDS, ANSWERS, LINKS = 12_000, 3_000, 30_000
PARTS = ("vocabulary", "check", "fingerprint", "first update")


def write(folder: Path, lines: int, images: int) -> None:
    """Write ``train.jsonl`` and pictures."""
    draws = random.Random(0)  # noqa: S311 - no secret
    words = ["".join(draws.choices("abcdefghiklmnoprstu", k=draws.randint(2, 9))) for _ in range(WORDS)]
    answers = [" ".join(draws.choices(words, k=draws.randint(1, 2))) for _ in range(ANSWERS)]
    folder.mkdir(parents=True, exist_ok=True)
    if images:
        _link_pictures(folder / "images", images)
    with (folder / "train.jsonl").open("w") as file:
        for number in range(lines):
            question = " ".join(draws.choices(words, k=draws.randint(4, 9))).capitalize() + "?"
            record = {"id": f"question_{number:09}", "question": question, "answer": draws.choice(answers)}
            if images:
                record["image"] = f"images/{number % images:012}.png"
            file.write(json.dumps(record) + "\n")


def _link_pictures(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:012}.png"
        if number % LINKS:  # a file system may limit the names of a file
            os.link(folder / f"{number - number % LINKS:012}.png", path)
        else:
            Image.new("RGB", (32, 32), "red").save(path)


def start(folder: Path, images: bool) -> dict[str, float]:
    """Do what a run does before its first update; return CPU seconds of the parts, and bytes of memory."""
    from villa.config.schema import BatchConfig
    from villa.datasets.own.jsonl import Jsonl, JsonlConfig

    config = JsonlConfig(train=str(folder / "train.jsonl"), regions="pixels" if images else "none")
    imported = _own()
    peak = [imported]
    threading.Thread(target=_sample, args=(peak,), daemon=True).start()
    times = [time.process_time()]
    data = Jsonl(config)
    _ = data.vocabulary
    times.append(time.process_time())
    split = data.split("train")
    held = _own()
    times.append(time.process_time())
    data.fingerprint()
    times.append(time.process_time())
    sampler = split.sampler(BatchConfig(tokens=2048), 0)
    first = sampler.update(sampler.start())
    highest = peak[0]  # before a batch, whose size depends on its images
    data.collate([split[index] for index in first[0]])
    times.append(time.process_time())
    parts = dict(zip(PARTS, (after - before for before, after in pairwise(times)), strict=True))
    return {"lines": len(split), "peak": highest - imported, "held": held - imported, **parts}


def _sample(found: list[int]) -> None:
    while True:
        found[0] = max(found[0], _own())
        time.sleep(0.02)


def _own() -> int:
    """Return the bytes of resident memory that are no pages of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def main() -> None:
    """Parse the options, write the lines and start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=2_000_000)
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the lines here, and use them if they are there")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start, bool(options.images))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        if not (folder / "train.jsonl").exists():
            write(folder, options.lines, options.images)
        command = [sys.executable, __file__, "--start", str(folder), "--images", str(options.images)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - this file
        values = json.loads(done.stdout.splitlines()[-1])
        lines = values["lines"]
        parts = ", ".join(f"{name} {values[name]:.1f}" for name in PARTS)
        print(
            f"{lines:,} lines: {sum(values[name] for name in PARTS):.1f} CPU seconds ({parts}); bytes a line: "
            f"{values['held'] / lines:.1f} held, {values['peak'] / lines:.1f} at the peak"
        )


if __name__ == "__main__":
    main()
