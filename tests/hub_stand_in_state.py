"""What the Hub stand-in holds: accounts, repositories, commits and files, without any HTTP.

A commit is one new entry in its repository, made only after all its operations were applied to a copy of the tree:
whatever fails before that leaves the branch where it was.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any


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
    """One commit: its sha, its parent's (``None`` for the first), message, description, whole tree and time (UTC)."""

    sha: str
    parent: str | None
    message: str
    tree: dict[str, Blob]
    description: str = ""
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass(frozen=True)
class Account:
    """Whom a token belongs to, and whether the token may ``"write"`` or only ``"read"``."""

    name: str
    role: str


@dataclass(frozen=True)
class Reply:
    """An answer before it is sent."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """Return ``value`` as a JSON answer; a date of a card's YAML becomes text."""
    body = json.dumps(value, default=str).encode()
    return Reply(body, status, {"Content-Type": "application/json", **(headers or {})})


class Refusal(Exception):
    """An error answer: status, ``X-Error-Message`` and, where the client looks at it, ``X-Error-Code``."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = json_reply({"error": message}, status, headers)


@dataclass
class Repo:
    """One model repository; ``branches`` and ``tags`` map a name to the sha of a commit."""

    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lfs_objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.repo_id.split("/")[0]

    def add_commit(self, branch: str, message: str, tree: dict[str, Blob], description: str = "") -> Commit:
        """Put a commit on top of ``branch``; the number of commits in its sha keeps equal trees apart."""
        parent = self.branches.get(branch)
        listing = [(path, blob.etag) for path, blob in sorted(tree.items())]
        seed = repr((self.repo_id, branch, parent, message, listing, len(self.commits)))
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, message, tree, description)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    def resolve(self, revision: str) -> Commit:
        """Return the commit of a branch, a tag, a sha or the first 7 or more characters of one.

        Raises:
            Refusal: As the Hub answers for an unknown revision.
        """
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits and re.fullmatch("[0-9a-f]{7,39}", sha):
            sha = next((full for full in self.commits if full.startswith(sha)), sha)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, revision: str) -> list[Commit]:
        """Return the commits that lead to ``revision``, newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits


@dataclass(frozen=True)
class Request:
    """One request as a route sees it; ``account`` is ``None`` for a client without a token."""

    params: dict[str, str]
    query: dict[str, list[str]]
    body: bytes
    headers: Any
    account: Account | None
    wrong_token: bool

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class HubState:
    """All accounts (by token) and repositories (by id), and who may do what.

    The status codes and messages are those that the Hub's own clients report. At an https address the client takes a
    401 about a repository for "no such repository"; at this address it has to be told by ``RepoNotFound``.
    """

    url: str
    accounts: dict[str, Account]
    repos: dict[str, Repo] = field(default_factory=dict)

    def account_of(self, authorization: str | None) -> tuple[Account | None, bool]:
        """Return whose token a request carries, and whether it carries a token that is nobody's."""
        if not authorization:
            return None, False
        account = self.accounts.get(authorization.removeprefix("Bearer "))
        return account, account is None

    def signed_in(self, request: Request) -> Account:
        """Return the caller's account; a missing or a wrong token is refused."""
        if request.wrong_token:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if request.account is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound" if "repo" in request.params else "")
        return request.account

    def readable(self, request: Request) -> Repo:
        """Return the repository that a request names, if there is one and the caller may see it."""
        if request.wrong_token:
            self.signed_in(request)
        repo = self.repos.get(request.params["repo"])
        if repo is not None and (not repo.private or (request.account and request.account.name == repo.owner)):
            return repo
        self.signed_in(request)
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def writable(self, request: Request, refusal: str) -> Repo:
        """Return the repository that a request names, if the caller may write to it; 403 ``refusal`` if not."""
        repo, account = self.readable(request), self.signed_in(request)
        if account.name != repo.owner or account.role != "write":
            raise Refusal(403, refusal)
        return repo
