"""Processes that have everything imported when they start, so that a kill hits the work, not imports."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def server(*modules: str, path: str | None = None) -> Iterator[Any]:
    """A context of multiprocessing whose processes have imported ``modules``, also those in the folder ``path``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, *filter(None, [path])]))  # sys.path is ignored
        patch.setenv("OMP_NUM_THREADS", "1")
        yield context
