"""A stand-in for the Hugging Face Hub on this machine: what huggingface_hub calls to upload and download models."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN, OWNER = "hf_" + "x" * 34, "somebody"


class Hub(ThreadingHTTPServer):
    """Repositories in memory. `repositories`: id → path → content; `commits`: id → messages."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.failing: int | None = None  # the status of every answer, where it is set


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def sha_of(files: dict[str, bytes]) -> str:
    """The commit's hash: of the files alone."""
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(path.encode() + b"\0" + content)
    return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route(
            (r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/.+)?", self._info),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/.+", self._tree),
            (r"/(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)", self._file),
        )

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._route(
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/models/(?P<repo>.+)/preupload/main", self._preupload),
            (r"/(?P<repo>.+)\.git/info/lfs/objects/batch", self._batch),
            (r"/api/models/(?P<repo>.+)/commit/main", self._commit),
        )

    def do_PUT(self) -> None:
        self._route((r"/lfs/(?P<oid>\w+)", self._put))

    def _route(self, *routes: tuple) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        if self.server.failing:
            return self._answer({"error": "out of order"}, self.server.failing)
        for pattern, answer in routes:
            if found := re.fullmatch(pattern, path):
                parts = {name: value for name, value in found.groupdict().items() if value is not None}
                if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self._answer({"error": "Invalid credentials"}, 401)
                if "repo" in parts and parts["repo"] not in self.server.repositories:
                    return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return answer(**parts)
        return self._answer({"error": f"the stand-in has no {path}"}, 501)

    def _answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or OWNER
        repo = f"{owner}/{asked['name']}"
        if owner != OWNER:
            return self._answer({"error": f"You don't have the rights to create a model under {owner}"}, 403)
        status = 409 if repo in self.server.repositories else 200
        self.server.repositories.setdefault(repo, {})
        self.server.private.setdefault(repo, asked.get("visibility") == "private" or asked.get("private") is True)
        return self._answer({"url": f"{self.server.url}/{repo}", "error": "You already created it"}, status)

    def _validate(self) -> None:
        header = json.loads(self.body)["content"].split("---")[1]
        errors = [] if isinstance(yaml.safe_load(header), dict) else [{"message": "not a YAML object"}]
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, repo: str) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".png")) else "regular"

        files = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False, "oid": None}
                 for f in json.loads(self.body)["files"]]  # fmt: skip
        self._answer({"files": files})

    def _batch(self, repo: str) -> None:
        objects = [{**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                   for each in json.loads(self.body)["objects"]]  # fmt: skip
        self._answer({"objects": objects, "transfer": "basic"})

    def _put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large[oid] = self.body
        self._answer({})

    def _commit(self, repo: str) -> None:
        files = self.server.repositories[repo]
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.server.commits.setdefault(repo, []).append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        sha = sha_of(files)
        self._answer({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def _info(self, repo: str) -> None:
        files = self.server.repositories[repo]
        self._answer({"id": repo, "sha": sha_of(files), "siblings": [{"rfilename": path} for path in files]})

    def _tree(self, repo: str) -> None:
        self._answer([{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                      for path, content in self.server.repositories[repo].items()])  # fmt: skip

    def _file(self, repo: str, path: str) -> None:
        files = self.server.repositories[repo]
        commit = {"X-Repo-Commit": sha_of(files)}
        if path not in files:
            return self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", **commit})
        return self._answer(files[path], headers={"ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"', **commit})
