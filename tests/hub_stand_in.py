"""A stand-in for the Hugging Face Hub on localhost, good enough for the unmodified client to push and load.

    with HubStandIn() as hub:
        hub.fail("lfs_batch", 503)
        hub.run("from huggingface_hub import HfApi; ...", tmp_path / "hf_home")
        assert hub.unused_faults == []
        assert "config.json" in hub.files("user/model")

``huggingface_hub`` reads ``HF_ENDPOINT`` when it is imported, so a client has to be a process of its own, started by
:meth:`HubStandIn.run` or with the variables of :meth:`HubStandIn.environment`. Repositories live in memory. Every
commit keeps its own sha and tree, so ``revision=`` takes a branch, a tag or a sha, and a commit that fails leaves its
branch as it was. Large or binary files take the Git LFS route (batch, PUT, verify), the others travel in the commit.

What tests look at (``KeyError`` if there is no such repository)::

    hub.files(repo_id, revision="main") -> dict[str, bytes]     hub.branches(repo_id) -> dict[str, str]  (name to sha)
    hub.read(repo_id, path, revision="main") -> bytes           hub.tags(repo_id) -> dict[str, str]
    hub.commits(repo_id, revision="main") -> list[Commit]       hub.is_private(repo_id) -> bool
    hub.repositories -> list[str]                               hub.requests -> list[LoggedRequest]

``commits`` is newest first, down to the empty "initial commit"; a ``Commit`` has ``sha``, ``parent``, ``message``,
``description`` and ``tree``. A ``LoggedRequest`` has ``method``, ``path`` (no query, no token), ``status`` (``None``
where the connection was cut before an answer) and ``kind``.

Faults wait for the next request of their kind whose path contains ``path``, strike ``times`` times and are gone;
``hub.unused_faults`` describes those still waiting. Kinds are the names in ``hub_stand_in_routes.KINDS``: whoami,
create, delete, settings, auth_check, validate_yaml, refs, commits, info, branch, tag, tree, paths_info, preupload,
commit, lfs_batch, lfs_verify, lfs_put, file_info (HEAD of a file), download (GET of a file)::

    hub.fail(kind, status=503, *, times=1, path="")             an error answer, and nothing is done
    hub.lose_answer(kind, *, times=1, path="")                  it is done, but the connection closes without an answer
    hub.delay(kind, seconds, *, times=1, path="")               it is done at once, but the answer comes late
    hub.cut_upload(kind="lfs_put", *, after=0, times=1, path="")    closes after ``after`` bytes of the request's body
    hub.cut_download(*, after=0, times=1, path="")              closes after ``after`` bytes of a file
    hub.commit_between(repo_id, files, *, delete=(), before="commit", branch="main", times=1)   another client commits
    hub.commit(repo_id, files, *, delete=(), branch="main", message=...) -> sha                 the same, but now

Tokens, as ``HF_TOKEN``: ``hub.token`` (writes as ``user``), ``hub.read_token`` (``user``, may not write),
``hub.stranger_token`` (the account ``stranger``, which writes its own repositories only). Any other is answered 401
"Invalid credentials", even on public repositories; ``HF_TOKEN=""`` is a client without a token. A private repository
is 404 to a stranger and 401 without a token, both ``RepositoryNotFoundError``; writing without the right is 403.

What the client does with it (2.4): every call of an upload is repeated after 1, 2, 4, 8 and 8 s on a lost connection
and on 429 and 5xx, except creating a repository, the YAML check and the commit itself, which fail at once. A commit
whose parent has changed is 412 in an ``HfHubHTTPError``.

What it does not exercise: Xet (the client must have ``HF_HUB_DISABLE_XET=1``; with Xet, ``upload_folder`` may make
several commits of one folder and repeats a commit on an error), multipart uploads, the redirect to a CDN, compressed
answers, listings of more than one page, ``.gitignore`` rules, datasets and Spaces, organizations and fine-grained
tokens, pull requests, gated repositories, squashing and moving, rate limits, quotas, names that the Hub refuses, and
what the Hub derives from files beside the card's own metadata (tags, widgets, safetensors). Of the card's metadata
few rules are checked (``hub_stand_in_card``). A new repository holds no ``.gitattributes``. A request that it does
not know is answered 501 and named in the message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from hub_stand_in_routes import KINDS, LFS_SIZE, LFS_SUFFIXES, ROUTES, Route
from hub_stand_in_state import Account, Blob, Commit, HubState, Refusal, Reply, Repo, Request

__all__ = ["KINDS", "LFS_SIZE", "Commit", "HubStandIn", "LoggedRequest"]


class LoggedRequest(NamedTuple):
    """One request and what it was answered; ``status`` is ``None`` where the connection was cut before an answer."""

    method: str
    path: str
    status: int | None
    kind: str


@dataclass
class _Fault:
    action: str  # fail, lose_answer, delay, cut_upload, cut_download or commit_between
    kind: str
    path: str
    times: int
    value: Any = None

    def __str__(self) -> str:
        return f"{self.action} on {self.kind}" + (f" of {self.path}" if self.path else "") + f", {self.times} left"


class HubStandIn:
    """The server, as a context manager; it listens on a free port of 127.0.0.1 while it is open.

    Args:
        user: The account of ``token``; a repository created without a namespace is theirs.
        token: A token that may write; ``read_token`` is the same account's, ``stranger_token`` another one's.

    Attributes:
        url: Address to give to a client as ``HF_ENDPOINT``.
        requests: Every request so far, in the order of the answers.
    """

    read_token = "hf_stand_in_read"
    stranger_token = "hf_stand_in_stranger"

    def __init__(self, user: str = "user", token: str = "hf_stand_in") -> None:
        self.user = user
        self.token = token
        self.requests: list[LoggedRequest] = []
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler_for(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        accounts = {token: Account(user, "write"), self.read_token: Account(user, "read")}
        self._state = HubState(self.url, accounts | {self.stranger_token: Account("stranger", "write")})

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    # ---- clients -----------------------------------------------------------------------------------

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

    def run(self, script: str, home: str | Path, *arguments: str, **variables: str) -> Any:
        """Run ``script`` in a new process with ``home`` as its cache; return the JSON of its last line of output.

        ``None`` if it prints nothing; ``RuntimeError`` with what it wrote to stderr if it fails.
        """
        command = [sys.executable, "-c", script, *arguments]
        env = self.environment(home, **variables)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        lines = done.stdout.splitlines()
        return json.loads(lines[-1]) if lines else None

    # ---- what tests look at ------------------------------------------------------------------------

    @property
    def repositories(self) -> list[str]:
        """The ids of all repositories, sorted."""
        with self._lock:
            return sorted(self._state.repos)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return path to content of every file."""
        tree = self._repo(repo_id).resolve(revision).tree
        return {path: blob.data for path, blob in sorted(tree.items())}

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """Return the content of one file; ``KeyError`` if there is none."""
        return self._repo(repo_id).resolve(revision).tree[path].data

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Return the commits that lead to ``revision``, newest first, down to the empty first one."""
        return self._repo(repo_id).history(revision)

    def branches(self, repo_id: str) -> dict[str, str]:
        """Return the name of every branch and the sha that it points to."""
        return dict(self._repo(repo_id).branches)

    def tags(self, repo_id: str) -> dict[str, str]:
        """Return the name of every tag and the sha that it points to."""
        return dict(self._repo(repo_id).tags)

    def is_private(self, repo_id: str) -> bool:
        """Return whether only the owner sees the repository."""
        return self._repo(repo_id).private

    def _repo(self, repo_id: str) -> Repo:
        with self._lock:
            return self._state.repos[repo_id]

    # ---- faults ------------------------------------------------------------------------------------

    @property
    def unused_faults(self) -> list[str]:
        """A description of every fault that has not struck as often as it was asked to."""
        with self._lock:
            return [str(fault) for fault in self._faults]

    def fail(self, kind: str, status: int = 503, *, times: int = 1, path: str = "") -> None:
        """Answer the next request of this kind with ``status`` and do nothing of what it asks."""
        self._add(_Fault("fail", kind, path, times, status))

    def lose_answer(self, kind: str, *, times: int = 1, path: str = "") -> None:
        """Do what the next request of this kind asks, but close the connection instead of answering."""
        self._add(_Fault("lose_answer", kind, path, times))

    def delay(self, kind: str, seconds: float, *, times: int = 1, path: str = "") -> None:
        """Do what the next request of this kind asks at once, but answer ``seconds`` later."""
        self._add(_Fault("delay", kind, path, times, seconds))

    def cut_upload(self, kind: str = "lfs_put", *, after: int = 0, times: int = 1, path: str = "") -> None:
        """Close the connection of the next request of this kind after reading ``after`` bytes of its body."""
        self._add(_Fault("cut_upload", kind, path, times, after))

    def cut_download(self, *, after: int = 0, times: int = 1, path: str = "") -> None:
        """Close the connection of the next GET of a file after sending ``after`` bytes of the answer's body."""
        self._add(_Fault("cut_download", "download", path, times, after))

    def commit_between(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        delete: Iterable[str] = (),
        before: str = "commit",
        branch: str = "main",
        times: int = 1,
    ) -> None:
        """Let another client commit to ``repo_id`` just before its next request of kind ``before`` is looked at."""
        what = {"repo_id": repo_id, "files": dict(files), "delete": tuple(delete), "branch": branch}
        self._add(_Fault("commit_between", before, f"/{repo_id}/", times, what))

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        delete: Iterable[str] = (),
        branch: str = "main",
        message: str = "by another client",
    ) -> str:
        """Commit as another client would, now; return the new sha. ``KeyError`` if a file to delete is not there."""
        with self._lock:
            return self._commit(repo_id, files, delete=delete, branch=branch, message=message)

    def _commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        delete: Iterable[str],
        branch: str,
        message: str = "by another client",
    ) -> str:
        repo = self._state.repos[repo_id]
        tree = dict(repo.resolve(branch).tree)
        for path in delete:
            del tree[path]
        tree |= {path: Blob(data, path.endswith(LFS_SUFFIXES) or b"\0" in data[:512]) for path, data in files.items()}
        return repo.add_commit(branch, message, tree).sha

    def _add(self, fault: _Fault) -> None:
        if fault.kind not in KINDS:
            raise ValueError(f"there is no kind of request {fault.kind!r}; it must be one of {', '.join(KINDS)}")
        if fault.times < 1:
            raise ValueError(f"a fault must strike at least once, got times={fault.times}")
        with self._lock:
            self._faults.append(fault)

    # ---- one request, as the handler sees it -------------------------------------------------------

    def take_faults(self, kind: str, path: str) -> dict[str, Any]:
        """Use up the first waiting fault of each action that fits; return action to value."""
        struck: dict[str, Any] = {}
        path = path.replace(".git/", "/") + "/"  # so that "/user/model/" is in every path of that repository only
        with self._lock:
            for fault in self._faults:
                if fault.kind == kind and fault.path in path and fault.action not in struck:
                    fault.times -= 1
                    struck[fault.action] = fault.value
            self._faults = [fault for fault in self._faults if fault.times > 0]
        return struck

    def answer(self, route: Route, params: dict[str, str], handler: BaseHTTPRequestHandler, body: bytes) -> Reply:
        """Run a route; what it refuses becomes an error answer, and so does a mistake of the stand-in itself."""
        with self._lock:
            account, wrong = self._state.account_of(handler.headers.get("Authorization"))
            query = parse_qs(urlsplit(handler.path).query)
            try:
                return route(self._state, Request(params, query, body, handler.headers, account, wrong))
            except Refusal as refusal:
                return refusal.reply
            except Exception as error:  # 501, since the client would repeat a 500 for half a minute
                return Refusal(501, f"the Hub stand-in failed: {error!r}").reply

    def commit_now(self, what: dict[str, Any]) -> None:
        """Make the commit of ``commit_between``."""
        with self._lock:
            self._commit(**what)

    def wait(self, seconds: float) -> None:
        """Wait, but no longer than the server is open."""
        self._closing.wait(seconds)

    def log(self, method: str, path: str, status: int | None, kind: str) -> None:
        """Add one request to the log, before its answer is sent: the client's next step finds it there."""
        with self._lock:
            self.requests.append(LoggedRequest(method, path, status, kind))


# ---- the HTTP side -------------------------------------------------------------------------------------


def _find_route(method: str, path: str) -> tuple[str, Route | None, dict[str, str]]:
    for kind, verb, pattern, route in ROUTES:
        match = pattern.fullmatch(path)
        if match is not None and verb == method:
            return kind, route, {name: unquote(value or "") for name, value in match.groupdict().items()}
    return "unknown", None, {}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet about clients that hang up; anything else is a mistake worth seeing."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler_for(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections open, as the client expects
        disable_nagle_algorithm = True  # otherwise each answer waits 40 ms for an acknowledgement

        def serve(self) -> None:
            path = urlsplit(self.path).path
            kind, route, params = _find_route(self.command, path)
            faults = hub.take_faults(kind, unquote(path))
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(min(length, faults.get("cut_upload", length)))
            if "cut_upload" in faults or len(body) < length:
                hub.log(self.command, path, None, kind)
                return self.hang_up()
            if "commit_between" in faults:
                hub.commit_now(faults["commit_between"])
            if route is None:
                reply = Refusal(501, f"the Hub stand-in has no {self.command} {path}").reply
            elif "fail" in faults:
                reply = Refusal(faults["fail"], "a fault that the test asked for").reply
            else:
                reply = hub.answer(route, params, self, body)
            hub.wait(faults.get("delay", 0))
            hub.log(self.command, path, None if "lose_answer" in faults else reply.status, kind)
            if "lose_answer" in faults:
                return self.hang_up()
            self.send(reply, faults.get("cut_download"))

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

        def send(self, reply: Reply, cut_after: int | None) -> None:
            self.send_response(reply.status)
            for name, value in (reply.headers | {"Content-Length": str(len(reply.body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body[:cut_after])
            if cut_after is not None:
                self.hang_up()

        def hang_up(self) -> None:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(SHUT_RDWR)

        def log_message(self, format: str, *args: Any) -> None:
            """Stay quiet: ``HubStandIn.requests`` is the log."""

    return Handler
