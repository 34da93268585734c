"""Runs of the example project that can be killed; imported by the process that forks them."""

import os
import sys
from pathlib import Path

# Imported before the fork, so that a start is quick and a kill hits the run.
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import numpy.random  # noqa: F401
import torch
import torch._dynamo  # fully_shard imports it when it is called

import villa.cli.run
import villa.distributed.data_parallel
import villa.distributed.fairscale_fsdp
import villa.distributed.fairscale_sdp
import villa.distributed.sharded
import villa.engine.optimizers
import villa.engine.run
import villa.engine.train
import villa.launch.base
import villa.trainers.villa  # noqa: F401

PROJECT = Path(__file__).parents[2] / "projects" / "example"

#: Everything that has a state: random starts, fp16 scaling, accumulation, early evaluation, fresh dropout seeds.
RECIPE = [
    f"config={PROJECT / 'shapes.yaml'}",
    f"user_dir={PROJECT / 'shapes'}",
    "trainer=villa",
    "batch.per_pass=8",
    "training.epochs=null",
    "training.updates=60",
    "training.clip_norm=1.0",
    "evaluation.every=10",
    "logging.every=4",
    "logging.tensorboard=false",
    "logging.figures=false",
    "logging.progress=off",
    "checkpoint.every=3",
    "checkpoint.resume=true",
]


def run(folder: str, *extra: str) -> None:
    """Run the recipe into ``folder`` in this process, and end the process with its exit code."""
    from villa.cli.run import main

    torch.set_num_threads(1)
    with Path(folder).with_suffix(".out").open("a") as output:
        sys.stdout = sys.stderr = output
        code = main([*RECIPE, f"output_dir={folder}", *extra])
        output.flush()
    os._exit(code)
