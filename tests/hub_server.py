"""A Hugging Face Hub on 127.0.0.1: repositories, commits, tags, tokens, LFS with checksums, and faults on demand.

It answers the requests of huggingface_hub 2.4.0 with classic LFS (``HF_HUB_DISABLE_XET=1``). Large files redirect to
the host name ``localhost``, as the real Hub redirects to a CDN: the client must drop its token on the way.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote

LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".png")
TOKENS = {"hf_write": "write", "hf_read": "read"}


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        seed = json.dumps([branch, len(self.commits), sorted(files)]).encode()
        oid = hashlib.sha1(seed).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


@dataclass
class Fault:
    """What to do with requests whose "METHOD path" matches, and how many times."""

    pattern: str
    kind: int | str  # a status code, or "hang", "truncate", "corrupt", "swap" (keep another config.json)
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1_000_000


class HubServer:
    """Runs the server in a thread for the length of a ``with`` block."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.fault: Fault | None = None
        self.requests: list[str] = []
        self.tokens_on_cdn: list[str] = []
        self.released = threading.Event()
        self.lock = threading.Lock()
        server = self

        class Handler(_Handler):
            hub = server

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.cdn_url = f"http://localhost:{self.http.server_port}/cdn"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Put files into a repository without HTTP and return the commit."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        old = repo.commits.get(repo.branches.get("main", ""), {})
        return repo.commit("main", {**old, **files})


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep test output clean."""

    def do_GET(self) -> None:
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    # Requests

    def _dispatch(self) -> None:
        self.path, _, self.query = unquote(self.path).partition("?")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {self.path}"
        with self.hub.lock:
            self.hub.requests.append(line)
            fault = self.hub.fault
            self.fault = fault if fault and fault.times > 0 and re.search(fault.pattern, line) else None
            if self.fault:
                self.fault.times -= 1
        if self.fault and self.fault.kind == "hang":
            self.hub.released.wait(60)
            self.close_connection = True
            return None
        if self.fault and isinstance(self.fault.kind, int):
            return self._error(self.fault.kind, "", "planted by the test", self.fault.headers)
        for pattern, handle in self._ROUTES:
            if match := re.fullmatch(pattern, line):
                return handle(self, *match.groups())
        return self._error(404, "", f"no route for {line}")

    def _role(self) -> str | None:
        return TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _repo(self, repo_id: str, write: bool = False) -> Repo | None:
        """The repository, or None after an error has been sent as the Hub would send it."""
        repo, role = self.hub.repos.get(repo_id), self._role()
        if role is None and (repo is None or repo.private or write):
            self._error(401, "RepoNotFound", "Invalid username or password.")
        elif repo is None:
            self._error(404, "RepoNotFound", "Repository not found")
        elif write and role != "write":
            self._error(403, "", "You don't have the required permissions to write to this repository")
        else:
            return repo
        return None

    def _create(self) -> None:
        if self._role() is None:
            return self._error(401, "", "Invalid username or password.")
        if self._role() != "write":
            return self._error(403, "", "You don't have the rights to create a model under this namespace")
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization'] or 'tester'}/{wanted['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            return self._json({"url": url, "error": "You already created this model repo"}, 409)
        repo = self.hub.repos[repo_id] = Repo(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repo.commit("main", {".gitattributes": b""})
        return self._json({"url": url, "name": repo_id})

    def _info(self, repo_id: str) -> None:
        if repo := self._repo(repo_id):
            files = repo.commits[repo.branches["main"]]
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo_id, "sha": repo.branches["main"], "private": repo.private, "siblings": siblings}
            self._json({"_id": "0", "tags": [], "downloads": 0, "likes": 0, **info})

    def _refs(self, repo_id: str) -> None:
        if repo := self._repo(repo_id):
            kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
            refs = {
                kind: [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": oid} for n, oid in names.items()]
                for kind, (folder, names) in kinds.items()
            }
            self._json({**refs, "converts": []})

    def _tag(self, repo_id: str, revision: str) -> None:
        if repo := self._repo(repo_id, write=True):
            name, oid = json.loads(self.body)["tag"], repo.resolve(revision)
            if name in repo.tags:
                return self._error(409, "", "Tag reference exists already")
            if oid is None:
                return self._error(404, "RevisionNotFound", "Invalid rev id")
            repo.tags[name] = oid
            self._json({})
        return None

    def _preupload(self, repo_id: str, _revision: str) -> None:
        if self._repo(repo_id, write=True):
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
            self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def _lfs_batch(self, repo_id: str) -> None:
        if self._repo(repo_id, write=True):
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                oid = wanted["oid"]
                verify = {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/verify"}
                actions = {"upload": {"href": f"{self.hub.cdn_url}/{oid}"}, "verify": verify}
                objects.append(wanted if oid in self.hub.lfs else {**wanted, "actions": actions})
            self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "", "checksum does not match the object id")
        self.hub.lfs[oid] = self.body
        return self._send(200, b"")

    def _lfs_verify(self, repo_id: str) -> None:
        wanted = json.loads(self.body)
        stored = self.hub.lfs.get(wanted["oid"])
        if stored is None or len(stored) != wanted["size"]:
            return self._error(422, "", "object missing or of another size")
        return self._json({})

    def _commit(self, repo_id: str, branch: str) -> None:
        repo = self._repo(repo_id, write=True)
        if repo is None:
            return None
        files = dict(repo.commits.get(repo.branches.get(branch, ""), {}))
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return self._error(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
        if self.fault and self.fault.kind == "swap":
            files["config.json"] += b"\n"
        oid = repo.commit(branch, files)
        return self._json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return None
        oid = repo.resolve(revision)
        if oid is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        commit = {"X-Repo-Commit": oid}
        data = repo.commits[oid].get(path)
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found", commit)
        if not path.endswith(LFS_SUFFIXES):
            sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            return self._file(data, {"ETag": f'"{sha1}"', **commit})
        sha256 = hashlib.sha256(data).hexdigest()
        self.hub.lfs[sha256] = data
        linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data)), **commit}
        return self._send(302, b"", {"Location": f"{self.hub.cdn_url}/{sha256}", **linked})

    def _lfs_get(self, oid: str) -> None:
        if token := self.headers.get("Authorization"):
            self.hub.tokens_on_cdn.append(token)
        return self._file(self.hub.lfs[oid], {"ETag": f'"{oid}"'})

    _ROUTES = (
        (r"POST /api/repos/create", _create),
        (r"POST /api/validate-yaml", lambda self: self._json({"errors": [], "warnings": []})),
        (r"GET /api/whoami-v2", lambda self: self._json({"name": "tester", "type": "user", "orgs": []})),
        (r"GET /api/models/([^/]+/[^/]+)", _info),
        (r"GET /api/models/([^/]+/[^/]+)/refs", _refs),
        (r"POST /api/models/([^/]+/[^/]+)/tag/(.+)", _tag),
        (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", _preupload),
        (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", _commit),
        (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", _lfs_batch),
        (r"POST /([^/]+/[^/]+)\.git/info/lfs/verify", _lfs_verify),
        (r"PUT /cdn/(\w+)", _lfs_put),
        (r"(?:GET|HEAD) /cdn/(\w+)", _lfs_get),
        (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _resolve),
    )

    # Answers

    def _file(self, data: bytes, headers: dict[str, str]) -> None:
        """A file body, honouring Range, with the planted damage if any."""
        status, start = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            status, start = 206, int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        data, kind = data[start:], self.fault.kind if self.fault else None
        if kind == "corrupt":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self._send(status, data, headers, sent=len(data) // 2 if kind == "truncate" else None)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        known = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {**known, "X-Error-Message": message, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True
