"""Tools run in this process, or in one that can be killed."""

import importlib.util
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(name: str) -> ModuleType:
    """Import a script of the folder ``tools``."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_and_kill(main: Callable[[list[str]], int], arguments: list[str], when: Callable[[], bool]) -> None:
    """Run a tool in a forked process and kill it with SIGKILL as soon as ``when`` says so."""
    process = multiprocessing.get_context("fork").Process(target=main, args=(arguments,))
    process.start()
    while not when():
        assert process.is_alive(), "the tool ended before it could be killed"
        time.sleep(0.0005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
