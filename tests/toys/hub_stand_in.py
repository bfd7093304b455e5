"""A stand-in for a model hub: the part of its HTTP API that huggingface_hub uses, served from memory by a thread.

What uses it runs in a process of its own, since huggingface_hub reads the address when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_writes"
READER = "hf_reads"
LARGE = ".safetensors"
"""The ending of files that go where large files go."""


@dataclass
class Repository:
    """A repository: the files of each commit, and the commits of branches."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Put files on a branch, and return the commit."""
        now = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        told = repr(
            (len(self.commits), branch, sorted((name, hashlib.sha1(each).hexdigest()) for name, each in now.items()))
        )
        commit = hashlib.sha1(told.encode()).hexdigest()
        self.commits[commit], self.branches[branch] = now, commit
        return commit

    def found(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


class Hub(ThreadingHTTPServer):
    """The server. What it was asked is in `asked`; its repositories can be written to directly."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.status = 0
        """A status with which every request is answered."""
        self.seconds = 0.0
        """How long every request waits."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def repository(self, name: str, **wishes: Any) -> Repository:
        """Make an empty repository."""
        self.repositories[name] = Repository(**wishes)
        self.repositories[name].commit({})
        return self.repositories[name]

    def add_folder(self, name: str, folder: Path, **wishes: Any) -> str:
        """Make a repository of the files in a folder, and return its commit."""
        files = {each.relative_to(folder).as_posix(): each.read_bytes() for each in folder.rglob("*") if each.is_file()}
        return self.repository(name, **wishes).commit(files)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, body: Any = None, status: int = 200, head: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(head or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        head = {"X-Error-Code": code, "X-Error-Message": message}
        self.answer({"error": message or code}, status, {name: each for name, each in head.items() if each})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_one(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        body = self.body()
        hub.asked.append(f"{self.command} {unquote(url.path)}")
        if token := self.headers.get("Authorization", "").removeprefix("Bearer "):
            hub.tokens.add(token)
        if hub.seconds:
            time.sleep(hub.seconds)
        if hub.status:
            return self.refuse(hub.status, message="Invalid credentials in Authorization header" if token else "")
        if token not in ("", TOKEN, READER):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = parse_qs(url.query)
        match (self.command, parts):
            case "POST", ["api", "repos", "create"]:
                return self.create(json.loads(body), token)
            case "POST", ["api", "validate-yaml"]:
                return self.answer({"warnings": [], "errors": []})
            case "PUT", ["blobs", digest]:
                assert hashlib.sha256(body).hexdigest() == digest
                hub.blobs[digest] = body
                return self.answer({})
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]).removesuffix(".git"), parts[2:]
        repository = hub.repositories.get(name)
        if repository is None or (repository.private and not token):
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if self.command in ("POST", "PUT") and token != TOKEN:
            return self.refuse(403, message="you may not write here")
        match (self.command, rest):
            case "GET", [] | ["revision", _]:
                return self.info(name, repository, rest[1] if rest else "main")
            case "GET", ["tree", revision]:
                return self.tree(repository, revision)
            case (("GET" | "HEAD"), ["resolve", revision, *path]):
                return self.resolve(repository, revision, "/".join(path))
            case "POST", ["branch", branch]:
                if branch in repository.branches:
                    return self.refuse(409)
                repository.branches[branch] = repository.branches["main"]
                return self.answer({})
            case "POST", ["preupload", revision]:
                return self.preupload(repository, revision, json.loads(body))
            case "POST", ["info", "lfs", "objects", "batch"]:
                return self.batch(json.loads(body))
            case "POST", ["commit", revision]:
                return self.commit(name, repository, revision, body, "create_pr" in query)
        self.refuse(404, message=f"the stand-in knows no {self.command} {self.path}")

    def create(self, wishes: dict[str, Any], token: str) -> None:
        name = f"{wishes.get('organization') or 'someone'}/{wishes['name']}"
        if token != TOKEN:
            return self.refuse(403, message="you may not write here")
        if name in self.server.repositories:
            return self.answer({"url": f"{self.server.address}/{name}"}, 409)
        private = wishes.get("visibility") == "private" or bool(wishes.get("private"))
        self.server.repository(name, private=private)
        self.answer({"url": f"{self.server.address}/{name}", "name": name})

    def info(self, name: str, repository: Repository, revision: str) -> None:
        if (commit := repository.found(revision)) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        files = [{"rfilename": each} for each in repository.commits[commit]]
        self.answer({"id": name, "sha": commit, "private": repository.private, "siblings": files, "tags": []})

    def tree(self, repository: Repository, revision: str) -> None:
        found = []
        for name, content in repository.commits[repository.found(revision) or ""].items():
            each: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
            each["oid"] = hashlib.sha1(content).hexdigest()
            if name.endswith(LARGE):
                each["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
            found.append(each)
        self.answer(found)

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        if (commit := repository.found(revision)) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if repository.gated:
            return self.refuse(403, "GatedRepo", "Access to this model is restricted")
        content = repository.commits[commit].get(path)
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        head = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self.answer(content, 200, head)

    def preupload(self, repository: Repository, revision: str, wishes: dict[str, Any]) -> None:
        if repository.found(revision) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        modes = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for each in wishes["files"]
        ]
        self.answer({"files": modes})

    def batch(self, wishes: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.address}/blobs/{each['oid']}", "header": {}}}}
            for each in wishes["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects}, 200, {"Content-Type": "application/vnd.git-lfs+json"})

    def commit(self, name: str, repository: Repository, revision: str, body: bytes, proposed: bool) -> None:
        files = {}
        for line in body.splitlines():
            each = json.loads(line)
            value = each["value"]
            if each["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif each["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        branch = "refs/pr/1" if proposed else revision
        repository.branches.setdefault(branch, repository.branches["main"])
        oid = repository.commit(files, branch)
        address = f"{self.server.address}/{name}"
        found = {"success": True, "commitUrl": f"{address}/commit/{oid}", "commitOid": oid}
        self.answer({**found, "pullRequestUrl": f"{address}/discussions/1" if proposed else None})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers within the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def outside(script: str, hub: Hub | str, home: Path, **variables: str) -> Any:
    """Run a script in a process of its own that takes `hub` for the hub; returns what its last line says, in JSON."""
    own = {name: each for name, each in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own |= {"HF_ENDPOINT": hub if isinstance(hub, str) else hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    own |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **variables}
    done = subprocess.run([sys.executable, "-c", script], env=own, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
