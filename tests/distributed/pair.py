"""Functions in two processes that know of each other as torchrun's do; all is imported once, before they start."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import forks

#: Seconds until processes that wait for each other are given up.
_PATIENCE = 600


def server() -> AbstractContextManager[Any]:
    """A context of multiprocessing whose processes start with torch and villa imported."""
    return forks.server("killing", "updates", path=str(Path(__file__).parent))


def in_processes(context: Any, function: Callable[..., None], *arguments: Any, count: int = 2) -> list[int]:
    """Run a function of a module in ``count`` processes; return their exit codes, by rank."""
    with socket.socket() as held:  # nobody else gets the port, but rank 0 may listen at it
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        started = [
            context.Process(target=_in_place, args=(rank, count, port, function, arguments)) for rank in range(count)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(_PATIENCE)
            process.kill()
    return [int(process.exitcode) for process in started]


def _in_place(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if count > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    faulthandler.enable()  # a crash in compiled code shows where
    function(*arguments)


def recipe(folder: str, *options: str) -> None:
    """Run the example recipe that the tests of resumption run; what it prints goes to ``<folder>.<rank>.out``."""
    from killing import RECIPE

    command(folder, *RECIPE, *options)


def command(folder: str, *options: str) -> None:
    """Run the command line; what it prints goes to ``<folder>.<rank>.out``."""
    from villa.cli.run import main

    output = Path(f"{folder}.{os.environ.get('RANK', '0')}.out")
    with output.open("a") as file:
        sys.stdout = sys.stderr = file
        code = main([f"output_dir={folder}", *options])
        file.flush()
    os._exit(code)


def recipe_until(folder: str, rank: int, number: int, path: str, *options: str) -> None:
    """Run the recipe; one of the processes gets a signal as soon as a file is in the folder."""

    def end() -> None:
        while not Path(folder, path).exists():
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    if os.environ["RANK"] == str(rank):
        threading.Thread(target=end, daemon=True).start()
    recipe(folder, *options)
