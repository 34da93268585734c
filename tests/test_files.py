from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from villa.errors import DataError
from villa.files import (
    atomic_write,
    fsync_tree,
    lines_of,
    local_path,
    plain_path,
    read_json,
    read_text,
    sha256,
    write_json,
)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        body = f"{self.headers['Host']}{self.path}".encode()
        self.send_response(404 if "missing" in self.path else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ThreadingHTTPServer]]:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    running = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in running:
        server.requests = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    for server in running:
        server.shutdown()
        server.server_close()


def url(server: ThreadingHTTPServer, path: str) -> str:
    return f"http://127.0.0.1:{server.server_port}/{path}"


def test_plain_paths_and_unknown_prefixes_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path(str(tmp_path / "a b")) == tmp_path / "a b"
    assert local_path("relative/file") == Path("relative/file")
    assert local_path("~/file") == tmp_path / "file"
    assert local_path("s3:bucket/file") == Path("s3:bucket/file")
    with pytest.raises(DataError, match="there is no such home folder"):
        local_path("~nobody-of-this-name/file")


@pytest.mark.parametrize("read", [local_path, plain_path])
def test_a_url_that_is_not_fetched_is_shown_as_it_is(read: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^'s3://bucket/a//b' is a URL, and is not fetched here"):
        read("s3://bucket/a//b")
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    with contextlib.chdir(tmp_path):
        assert read("s3://bucket") == Path("s3:/bucket")


def test_url_is_downloaded_once(servers: list[ThreadingHTTPServer], tmp_path: Path) -> None:
    address = url(servers[0], "sub/file.txt")
    path = local_path(address)
    assert path.read_text() == address.removeprefix("http://")
    assert tmp_path in path.parents
    assert local_path(address) == path
    assert servers[0].requests == ["/sub/file.txt"]  # type: ignore[attr-defined]


def test_equal_paths_on_two_hosts_are_two_files(servers: list[ThreadingHTTPServer]) -> None:
    addresses = [url(server, "sub/file.txt") for server in servers]
    assert [local_path(a).read_text() for a in addresses] == [a.removeprefix("http://") for a in addresses]


def test_failed_download_is_one_line_and_leaves_no_file(servers: list[ThreadingHTTPServer], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot download 'http.*missing.bin': HTTPError: HTTP Error 404") as error:
        local_path(url(servers[0], "missing.bin"))
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_url_cannot_leave_the_cache(servers: list[ThreadingHTTPServer], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has '\.\.' in its path"):
        local_path(url(servers[0], "../../outside.txt"))
    assert not (tmp_path / "outside.txt").exists()
    assert servers[0].requests == []  # type: ignore[attr-defined]


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    atomic_write(target, "grün")
    atomic_write(target, b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_write_has_the_permissions_of_a_plain_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "atomic", "x")
    (tmp_path / "plain").write_text("x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("atomic", "plain")]
    assert modes[0] == modes[1]


def test_full_disk_leaves_the_old_contents(tmp_path: Path) -> None:
    target = tmp_path / "file"
    atomic_write(target, "old")
    code = (
        "import resource, signal, sys; from pathlib import Path; from villa.files import atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "atomic_write(Path(sys.argv[1]), b'x' * 5000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=False)
    assert "OSError" in done.stderr
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_json_has_sorted_keys_and_no_nan(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"b": 1.5, "a": ["é", None]})
    assert list(json.loads(target.read_text())) == ["a", "b"]
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(target, {"a": math.nan})
    assert json.loads(target.read_text()) == {"a": ["é", None], "b": 1.5}


def test_sha256_is_that_of_the_contents(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_fsync_tree_reaches_every_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        fsync_tree(tmp_path)
    (tmp_path / "nowhere").write_text("x")
    fsync_tree(tmp_path)


def test_texts_are_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + "é\r\nb".encode())
        assert read_text(path) == "é\r\nb"
    path.write_bytes(b"a\nb\n\xe9")
    with pytest.raises(
        DataError, match=r"the list '.*a\.txt' is not UTF-8 text \(byte 0xe9 in line 3\); save it as UTF-8"
    ):
        read_text(path, "list")
    with pytest.raises(DataError, match=r"cannot read the list '.*none' \(No such file or directory\); look again"):
        read_text(tmp_path / "none", "list", "look again")
    with pytest.raises(DataError, match="embedded null"):
        read_text(Path("a\0b"))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("a", ["a"]),
        ("a\nb\r\n", ["a", "b"]),
        ("\na\n\n", ["", "a", ""]),
        ("a\x0b\x0c\x1c\x85\u2028\u2029b\rc\n", ["a\x0b\x0c\x1c\x85\u2028\u2029b\rc"]),
    ],
)
def test_lines_end_at_line_feeds_alone(text: str, lines: list[str]) -> None:
    assert lines_of(text) == lines


def test_json_of_others(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text('{"é": 1}', encoding=encoding)
        assert read_json(path, "list") == {"é": 1}
    path.write_text('{"é": 1,\n"é": 2}')
    with pytest.raises(
        DataError, match=r"the list '.*' is not valid JSON \('é' occurs twice .*line 2\); mend the path"
    ):
        read_json(path, "list")
    path.write_bytes(b'{"a":\n"\xff"}')
    with pytest.raises(DataError, match=r"is not UTF-8 text \(byte 0xff in line 2\)"):
        read_json(path, "list")


@pytest.mark.parametrize("read", [read_text, read_json])
def test_a_file_that_memory_cannot_hold_is_not_read(tmp_path: Path, read: Callable[[Path, str], Any]) -> None:
    path = tmp_path / "huge.json"
    path.write_text("[")
    os.truncate(path, 1 << 43)
    with pytest.raises(DataError, match=r"the answers '.*' has 8,796,093,022,208 bytes, too many for the memory"):
        read(path, "answers")


@pytest.mark.parametrize("read", [read_text, read_json])
def test_pipes_and_devices_are_not_waited_for(tmp_path: Path, read: Callable[[Path, str], Any]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path / "zero.json", "a pipe"), (tmp_path, "a folder")):
        with pytest.raises(DataError, match=rf"cannot read the answers '{path}' \(it is {kind}"):
            read(path, "answers")
        with pytest.raises(OSError, match=f"it is {kind}"):
            sha256(path)
