"""A small server that speaks the model hub's HTTP, for its real client: repositories, commits, revisions, downloads."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hub-token-of-the-test"


@dataclass
class Repository:
    private: bool
    #: Files by name, by commit.
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    #: Commits by branch.
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.sha(revision)]

    def sha(self, revision: str) -> str:
        return self.branches.get(revision, revision)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.messages)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha


class HubServer(ThreadingHTTPServer):
    """Serves ``repositories`` on a free port of this machine until the ``with`` block ends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        super().__exit__(*args)


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        writer = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            return self._send({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body)) if writer else self._refuse(401, "log in first")
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/(.+))?)?", path)
        found = None if match is None else self.server.repositories.get(match[1])
        if match is None or found is None or (found.private and not writer):
            return self._refuse(404, "Repository not found", "RepoNotFound")
        if self.command == "POST" and not writer and match[2] != "paths-info":
            return self._refuse(403, "not yours")
        getattr(self, f"_{(match[2] or 'revision').replace('-', '_')}")(found, match[1], match[3] or "main", body)
        return None

    def _create(self, given: dict[str, Any]) -> None:
        name = f"{given['organization']}/{given['name']}"
        if name in self.server.repositories:
            address = f"{self.server.address}/{name}"
            return self._send({"error": "You already created this model repo", "url": address}, 409)
        made = self.server.repositories[name] = Repository(
            given.get("visibility") == "private" or given.get("private") is True  # as newer clients say it, or older
        )
        made.commit("main", {".gitattributes": b""}, "initial commit")
        return self._send({"url": f"{self.server.address}/{name}"})

    def _revision(self, found: Repository, name: str, revision: str, body: bytes) -> None:
        sha = found.sha(revision)
        if sha not in found.commits:
            return self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        siblings = [{"rfilename": file} for file in found.commits[sha]]
        card = re.search(rb"^license: (.+)$", found.commits[sha].get("README.md", b""), re.MULTILINE)
        data = {"license": card[1].decode()} if card else {}
        return self._send(
            {"id": name, "modelId": name, "sha": sha, "private": found.private, "siblings": siblings, "cardData": data}
        )

    def _tree(self, found: Repository, name: str, revision: str, body: bytes) -> None:
        self._send([_entry(file, content) for file, content in found.files(revision.partition("/")[0]).items()])

    def _paths_info(self, found: Repository, name: str, revision: str, body: bytes) -> None:
        files = found.files(revision)
        self._send([_entry(file, files[file]) for file in json.loads(body)["paths"] if file in files])

    def _branch(self, found: Repository, name: str, branch: str, body: bytes) -> None:
        if branch in found.branches:
            return self._refuse(409, "Reference already exists")
        found.branches[branch] = found.branches["main"]
        return self._send({})

    def _preupload(self, found: Repository, name: str, revision: str, body: bytes) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        self._send({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})

    def _commit(self, found: Repository, name: str, branch: str, body: bytes) -> None:
        files, message = dict(found.files(branch)), ""
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                message = line["value"]["summary"]
            elif line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
            else:
                raise NotImplementedError(line["key"])
        sha = found.commit(branch, files, message)
        self._send({"commitOid": sha, "commitUrl": f"{self.server.address}/{name}/commit/{sha}", "success": True})

    def _resolve(self, found: Repository, name: str, place: str, body: bytes) -> None:
        revision, _, file = place.partition("/")
        content = found.files(revision).get(file)
        if content is None:
            return self._refuse(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": found.sha(revision)}
        return self._send(content, headers=headers)

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        self._send({"error": message}, status, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})})

    def _send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for name, text in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(file: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": file, "size": len(content), "oid": _oid(content)}
