"""What the processes of a submitted job print."""

from __future__ import annotations

from pathlib import Path

#: How submitit's own lines begin; after an error, those of a traceback follow.
_OWN, _ERROR = "submitit ", "submitit ERROR"


class Log:
    """A process's log, read as it grows, without submitit's own lines.

    Args:
        path: the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._muted = False

    def new_lines(self, *, last: bool = False) -> list[str]:
        """Return the lines that have come since the last call.

        Args:
            last: nothing comes any more: a line without an end counts, too.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text if last else text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        lines = whole.decode(errors="replace").split("\n")
        return [line for line in (lines if lines[-1] else lines[:-1]) if self._is_of_run(line)]

    def _is_of_run(self, line: str) -> bool:
        if line.startswith(_OWN):
            self._muted = line.startswith(_ERROR)
            return False
        return not self._muted
