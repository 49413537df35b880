"""A stand-in for the Hugging Face Hub on localhost, good enough for the unmodified client to push and load.

    with HubStandIn() as hub:
        env = hub.environment(tmp_path / "hf_home")
        subprocess.run([sys.executable, "push.py"], env=env, check=True)
        assert "config.json" in hub.files("user/model")

``huggingface_hub`` reads ``HF_ENDPOINT`` when it is imported, so a client has to be a process of its own,
started with the variables of :meth:`HubStandIn.environment`. Repositories and commits live in memory. Every
commit keeps its own sha and tree, so ``revision=`` takes a branch, a tag or a sha. Large or binary files take
the Git LFS route (batch endpoint, then PUT), the others travel inside the commit.

What it does not exercise: Xet (the client must have ``HF_HUB_DISABLE_XET=1``), multipart uploads, resumed
downloads and the redirect to a CDN, datasets and Spaces, pull requests, gated repositories, the metadata that
the Hub derives from a model card (``card_data``, ``pipeline_tag``, widgets) and the validation of the real
server: any YAML and any name pass, nothing is rate limited, and a new repository holds no ``.gitattributes``.
A request that it does not know is answered 501 and named in the message.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SIZE = 10 * 1024 * 1024  # bytes; the Hub takes no larger file inside a commit
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".parquet", ".arrow", ".zip")


@dataclass(frozen=True)
class Blob:
    """The content of one file, and whether it came by the LFS route."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """One commit: its sha, its parent's (``None`` for the first), its message and its whole tree."""

    sha: str
    parent: str | None
    message: str
    tree: dict[str, Blob]


@dataclass
class _Repo:
    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add_commit(self, branch: str, message: str, tree: dict[str, Blob]) -> Commit:
        """Put a commit on top of ``branch``; the number of commits in its sha keeps equal trees apart."""
        parent = self.branches.get(branch)
        listing = [(path, blob.etag) for path, blob in sorted(tree.items())]
        seed = repr((self.repo_id, branch, parent, message, listing, len(self.commits)))
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, message, tree)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    def resolve(self, revision: str) -> Commit:
        """Return the commit of a branch, a tag or a sha; refuse an unknown one as the Hub does."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]


@dataclass(frozen=True)
class _Request:
    query: dict[str, list[str]]
    body: bytes
    headers: Any
    signed: bool
    params: dict[str, str]

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class _Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class _Refusal(Exception):
    """An error answer: status, ``X-Error-Message`` and, where the client looks at it, ``X-Error-Code``."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = _json_reply({"error": message}, status, headers)


def _json_reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> _Reply:
    return _Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))


class HubStandIn:
    """The server, as a context manager; it listens on a free port of 127.0.0.1 while it is open.

    Args:
        user: The account that ``token`` belongs to; a repository created without a namespace is theirs.
        token: The one token that may write and that sees private repositories.

    Attributes:
        url: Address to give to a client as ``HF_ENDPOINT``.
        requests: ``"METHOD /path"`` of every request so far, in order of arrival.
    """

    def __init__(self, user: str = "user", token: str = "hf_stand_in") -> None:
        self.user = user
        self.token = token
        self.requests: list[str] = []
        self._repos: dict[str, _Repo] = {}
        self._lfs_objects: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: str | Path, **extra: str) -> dict[str, str]:
        """Return the variables for a client process: this server, its token and an empty ``HF_HOME``.

        Args:
            home: Folder for the client's cache; give each process that must start clean its own.
            **extra: More variables, which win over the others.
        """
        of_the_client = ("HF_", "HUGGING", "TRANSFORMERS_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(of_the_client)}
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return inherited | ours | extra

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return path to content of every file; ``KeyError`` if there is no such repository."""
        with self._lock:
            tree = self._repos[repo_id].resolve(revision).tree
            return {path: blob.data for path, blob in sorted(tree.items())}

    def history(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Return the commits of a branch, newest first, down to the empty one that created the repository."""
        with self._lock:
            repo = self._repos[repo_id]
            commits = [repo.resolve(revision)]
            while commits[-1].parent is not None:
                commits.append(repo.commits[commits[-1].parent])
            return commits

    def answer(self, method: str, target: str, body: bytes, headers: Any) -> _Reply:
        """Find the route of one request and run it; what it refuses becomes an error answer."""
        url = urlsplit(target)
        signed = headers.get("Authorization") == f"Bearer {self.token}"
        with self._lock:
            self.requests.append(f"{method} {url.path}")
            for verb, pattern, route in _ROUTES:
                match = pattern.fullmatch(url.path)
                if match is None or verb != ("GET" if method == "HEAD" else method):
                    continue
                params = {name: unquote(value or "") for name, value in match.groupdict().items()}
                request = _Request(parse_qs(url.query), body, headers, signed, params)
                try:
                    return route(self, request)
                except _Refusal as refusal:
                    return refusal.reply
        return _Refusal(501, f"the Hub stand-in has no {method} {url.path}").reply

    def _repo(self, request: _Request) -> _Repo:
        """Return the repository that a request names, if there is one and the caller may see it."""
        repo = self._repos.get(request.params["repo"])
        if repo is None or (repo.private and not request.signed):
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return repo


def _require_token(request: _Request) -> None:
    if not request.signed:
        raise _Refusal(401, "Invalid username or password.")


# ---- routes: accounts and repositories -----------------------------------------------------------


def _who_am_i(hub: HubStandIn, request: _Request) -> _Reply:
    _require_token(request)
    token = {"accessToken": {"role": "write", "displayName": "stand-in"}}
    return _json_reply({"type": "user", "name": hub.user, "fullname": hub.user, "orgs": [], "auth": token})


def _create_repo(hub: HubStandIn, request: _Request) -> _Reply:
    _require_token(request)
    wanted = request.json()
    if wanted.get("type") not in (None, "model"):
        raise _Refusal(501, f"the Hub stand-in holds models, no {wanted['type']}")
    repo_id = f"{wanted.get('organization') or hub.user}/{wanted['name']}"
    about = {"url": f"{hub.url}/{repo_id}", "name": repo_id}
    if repo_id in hub._repos:
        return _json_reply(about | {"error": "You already created this model repo"}, 409)
    hub._repos[repo_id] = _Repo(repo_id, private=wanted.get("visibility") == "private")
    hub._repos[repo_id].add_commit("main", "initial commit", {})
    return _json_reply(about)


def _repo_info(hub: HubStandIn, request: _Request) -> _Reply:
    repo = hub._repo(request)
    commit = repo.resolve(request.params.get("rev") or "main")
    siblings = [
        {"rfilename": path, "size": len(blob.data), "blobId": blob.git_oid, **_lfs_entry(blob)}
        for path, blob in sorted(commit.tree.items())
    ]
    about = {"id": repo.repo_id, "author": repo.repo_id.split("/")[0], "sha": commit.sha, "tags": []}
    access = {"private": repo.private, "gated": False, "disabled": False}
    return _json_reply(about | access | {"siblings": siblings})


def _validate_yaml(hub: HubStandIn, request: _Request) -> _Reply:
    return _json_reply({"errors": [], "warnings": []})


# ---- routes: revisions ---------------------------------------------------------------------------


def _create_branch(hub: HubStandIn, request: _Request) -> _Reply:
    _require_token(request)
    repo, name = hub._repo(request), request.params["rev"]
    if name in repo.branches:
        raise _Refusal(409, f"Reference already exists: {name}")
    repo.branches[name] = repo.resolve(request.json().get("startingPoint") or "main").sha
    return _json_reply({})


def _create_tag(hub: HubStandIn, request: _Request) -> _Reply:
    _require_token(request)
    repo, name = hub._repo(request), request.json()["tag"]
    if name in repo.tags:
        raise _Refusal(409, f"Tag reference exists already: {name}")
    repo.tags[name] = repo.resolve(request.params["rev"]).sha
    return _json_reply({})


# ---- routes: reading files -----------------------------------------------------------------------


def _lfs_entry(blob: Blob) -> dict[str, Any]:
    """Return the ``lfs`` part of a listing; empty for a file that is not stored by LFS."""
    about = {"oid": blob.sha256, "sha256": blob.sha256, "size": len(blob.data), "pointerSize": 134}
    return {"lfs": about} if blob.lfs else {}


def _tree_entries(tree: dict[str, Blob]) -> dict[str, dict[str, Any]]:
    """Return path to listing entry, of the files and of the folders that hold them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(tree.items()):
        for parent in [str(p) for p in Path(path).parents][:-1]:
            oid = hashlib.sha1(parent.encode()).hexdigest()
            entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": oid}
        entries[path] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
        entries[path] |= _lfs_entry(blob)
    return entries


def _list_tree(hub: HubStandIn, request: _Request) -> _Reply:
    tree = hub._repo(request).resolve(request.params["rev"]).tree
    folder = request.params["path"].strip("/")
    prefix = f"{folder}/" if folder else ""
    inside = [entry for path, entry in sorted(_tree_entries(tree).items()) if path.startswith(prefix)]
    if folder and not inside:
        raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
    if request.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
        inside = [entry for entry in inside if "/" not in entry["path"].removeprefix(prefix)]
    return _json_reply(inside)


def _resolve_file(hub: HubStandIn, request: _Request) -> _Reply:
    commit = hub._repo(request).resolve(request.params["rev"])
    blob = commit.tree.get(request.params["path"])
    if blob is None:
        raise _Refusal(404, "Entry not found", "EntryNotFound")
    return _Reply(blob.data, 200, {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.sha})


# ---- routes: writing files -----------------------------------------------------------------------


def _preupload(hub: HubStandIn, request: _Request) -> _Reply:
    """Say how to send each file, and the oid of what is there, so that the client skips what is equal."""
    _require_token(request)
    tree = hub._repo(request).resolve(request.params["rev"]).tree
    answers = []
    for file in request.json()["files"]:
        path = file["path"]
        binary = b"\0" in base64.b64decode(file["sample"])
        lfs = binary or file["size"] > LFS_SIZE or path.endswith(LFS_SUFFIXES)
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        answers.append(answer | ({"oid": tree[path].etag} if path in tree else {}))
    return _json_reply({"files": answers})


def _lfs_batch(hub: HubStandIn, request: _Request) -> _Reply:
    _require_token(request)
    hub._repo(request)
    objects = []
    for wanted in request.json()["objects"]:
        upload = {"actions": {"upload": {"href": f"{hub.url}/lfs-objects/{wanted['oid']}"}}}
        objects.append(wanted | ({} if wanted["oid"] in hub._lfs_objects else upload))
    return _json_reply({"transfer": "basic", "objects": objects})


def _put_lfs_object(hub: HubStandIn, request: _Request) -> _Reply:
    oid = hashlib.sha256(request.body).hexdigest()
    if oid != request.params["oid"]:
        raise _Refusal(400, f"the content has sha256 {oid}, not {request.params['oid']}")
    hub._lfs_objects[oid] = request.body
    return _Reply()


def _commit(hub: HubStandIn, request: _Request) -> _Reply:
    _require_token(request)
    repo, branch = hub._repo(request), request.params["rev"]
    if branch not in repo.branches:
        raise _Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    if request.query.get("create_pr"):
        raise _Refusal(501, "the Hub stand-in has no pull requests")
    header, *operations = [json.loads(line) for line in request.body.splitlines() if line]
    parent = header["value"].get("parentCommit")
    if parent is not None and parent != repo.branches[branch]:
        raise _Refusal(412, f"A commit has happened since {parent}")
    tree = dict(repo.resolve(branch).tree)
    for operation in operations:
        _apply(hub, tree, operation["key"], operation["value"])
    commit = repo.add_commit(branch, header["value"]["summary"], tree)
    url = f"{hub.url}/{repo.repo_id}/commit/{commit.sha}"
    return _json_reply({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})


def _apply(hub: HubStandIn, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    """Apply one line of a commit to ``tree``, in place."""
    path = value["path"]
    if key == "file":
        tree[path] = Blob(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in hub._lfs_objects:
            raise _Refusal(400, f"LFS object {value['oid']} of {path} was never uploaded")
        tree[path] = Blob(hub._lfs_objects[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        prefix = path.rstrip("/") + "/"
        gone = [p for p in tree if (p.startswith(prefix) if key == "deletedFolder" else p == path)]
        if not gone:
            raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        for p in gone:
            del tree[p]
    else:
        raise _Refusal(501, f"the Hub stand-in has no commit operation {key!r}")


# ---- the HTTP side -------------------------------------------------------------------------------

_API = r"/api/models/(?P<repo>[^/]+/[^/]+|[^/]+)"
_PAGE = r"/(?P<repo>[^/]+/[^/]+|[^/]+)"
_Route = Callable[[HubStandIn, _Request], _Reply]
_ROUTES: list[tuple[str, re.Pattern[str], _Route]] = [
    (verb, re.compile(pattern), route)
    for verb, pattern, route in [
        ("GET", r"/api/whoami-v2", _who_am_i),
        ("POST", r"/api/repos/create", _create_repo),
        ("POST", r"/api/validate-yaml", _validate_yaml),
        ("GET", _API, _repo_info),
        ("GET", _API + r"/revision/(?P<rev>[^/]+)", _repo_info),
        ("POST", _API + r"/branch/(?P<rev>[^/]+)", _create_branch),
        ("POST", _API + r"/tag/(?P<rev>[^/]+)", _create_tag),
        ("GET", _API + r"/tree/(?P<rev>[^/]+)(?P<path>/.*)?", _list_tree),
        ("POST", _API + r"/preupload/(?P<rev>[^/]+)", _preupload),
        ("POST", _API + r"/commit/(?P<rev>[^/]+)", _commit),
        ("POST", _PAGE + r"\.git/info/lfs/objects/batch", _lfs_batch),
        ("PUT", r"/lfs-objects/(?P<oid>[0-9a-f]{64})", _put_lfs_object),
        ("GET", _PAGE + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)", _resolve_file),
    ]
]


def _handler_for(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections open, as the client expects
        disable_nagle_algorithm = True  # otherwise each answer waits 40 ms for an acknowledgement

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = hub.answer(self.command, self.path, body, self.headers)
            self.send_response(reply.status)
            for name, value in (reply.headers | {"Content-Length": str(len(reply.body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)

        do_GET = do_HEAD = do_POST = do_PUT = serve

        def log_message(self, format: str, *args: Any) -> None:
            """Stay quiet: ``HubStandIn.requests`` is the log."""

    return Handler
