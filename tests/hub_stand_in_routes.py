"""The routes of the Hub stand-in: what each kind of request does and what it answers.

A route takes the state of the Hub and one request and returns the answer; it raises ``Refusal`` for an error answer.
:data:`ROUTES` names the kinds, by which tests switch faults on and read the log.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs

import yaml
from hub_stand_in_card import card_metadata, check_card
from hub_stand_in_state import Account, Blob, Commit, HubState, Refusal, Reply, Repo, Request, json_reply

LFS_SIZE = 10 * 1024 * 1024  # bytes; the Hub takes no larger file inside a commit
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".parquet", ".arrow", ".zip")
NO_PUSH = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
NO_RIGHTS = "Authorization error."
NO_LFS = "You have read access but not the required permissions for this operation"


def _is_true(request: Request, name: str) -> bool:
    return request.query.get(name, ["false"])[0].lower() in ("true", "1")


# ---- accounts and repositories ---------------------------------------------------------------------


def _who_am_i(hub: HubState, request: Request) -> Reply:
    account = hub.signed_in(request)
    token = {"type": "access_token", "accessToken": {"role": account.role, "displayName": "stand-in"}}
    return json_reply({"type": "user", "name": account.name, "fullname": account.name, "orgs": [], "auth": token})


def _check_namespace(account: Account, owner: str, verb: str) -> None:
    if account.name != owner or account.role != "write":
        raise Refusal(403, f'You don\'t have the rights to {verb} a model under the namespace "{owner}"')


def _create_repo(hub: HubState, request: Request) -> Reply:
    account, wanted = hub.signed_in(request), request.json()
    if wanted.get("type") not in (None, "model"):
        raise Refusal(501, f"the Hub stand-in holds models, no {wanted['type']}")
    owner = wanted.get("organization") or account.name
    _check_namespace(account, owner, "create")
    repo_id = f"{owner}/{wanted['name']}"
    about = {"url": f"{hub.url}/{repo_id}", "name": repo_id}
    if repo_id in hub.repos:
        return json_reply(about | {"error": "You already created this model repo"}, 409)
    hub.repos[repo_id] = Repo(repo_id, private=wanted.get("visibility") == "private")
    hub.repos[repo_id].add_commit("main", "initial commit", {})
    return json_reply(about)


def _delete_repo(hub: HubState, request: Request) -> Reply:
    account, wanted = hub.signed_in(request), request.json()
    request.params["repo"] = f"{wanted.get('organization') or account.name}/{wanted['name']}"
    repo = hub.readable(request)
    _check_namespace(account, repo.owner, "delete")
    del hub.repos[repo.repo_id]
    return json_reply({})


def _change_settings(hub: HubState, request: Request) -> Reply:
    repo, wanted = hub.writable(request, NO_RIGHTS), request.json()
    if set(wanted) - {"visibility"}:
        raise Refusal(501, f"the Hub stand-in has no settings {sorted(set(wanted) - {'visibility'})}")
    repo.private = wanted["visibility"] == "private"
    return json_reply({"private": repo.private})


def _auth_check(hub: HubState, request: Request) -> Reply:
    repo = hub.writable(request, NO_RIGHTS) if request.params["write"] else hub.readable(request)
    return json_reply({"id": repo.repo_id})


def _repo_info(hub: HubState, request: Request) -> Reply:
    repo = hub.readable(request)
    commit = repo.resolve(request.params.get("rev") or "main")
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.tree)]
    if _is_true(request, "blobs"):
        for sibling in siblings:
            blob = commit.tree[sibling["rfilename"]]
            sibling |= {"size": len(blob.data), "blobId": blob.git_oid, **_lfs_entry(blob)}
    card = _card_of(commit)
    about: dict[str, Any] = {"id": repo.repo_id, "modelId": repo.repo_id, "author": repo.owner, "sha": commit.sha}
    about |= {"createdAt": repo.history("main")[-1].date, "lastModified": commit.date, "downloads": 0, "likes": 0}
    about |= {"private": repo.private, "gated": False, "disabled": False, "siblings": siblings}
    about |= {"tags": card.get("tags", [])} | ({"cardData": card} if card else {})
    about |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
    wanted = set(request.query.get("expand", about)) | {"id"}
    return json_reply({key: value for key, value in about.items() if key in wanted})


def _card_of(commit: Commit) -> dict[str, Any]:
    try:
        card = card_metadata(commit.tree["README.md"].data.decode())
    except (KeyError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return card if isinstance(card, dict) else {}


def _validate_yaml(hub: HubState, request: Request) -> Reply:
    """Check a card's metadata, for anyone; as JSON or, for ``RepoCard.validate``, as plain text."""
    errors, warnings = check_card(request.json()["content"])
    status = 400 if errors else 200
    if request.headers.get("Accept") == "text/plain":
        lines = [f"- Error: {text}" for text in errors] + [f"- Warning: {text}" for text in warnings]
        return Reply("\n".join(lines).encode(), status, {"Content-Type": "text/plain"})
    return json_reply(
        {"errors": [{"message": t} for t in errors], "warnings": [{"message": t} for t in warnings]}, status
    )


# ---- revisions -------------------------------------------------------------------------------------


def _list_refs(hub: HubState, request: Request) -> Reply:
    repo = hub.readable(request)
    refs: dict[str, Any] = {"converts": []}
    for key, folder, names in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags)):
        refs[key] = [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": sha} for n, sha in names.items()]
    return json_reply(refs | ({"pullRequests": []} if _is_true(request, "include_prs") else {}))


def _list_commits(hub: HubState, request: Request) -> Reply:
    repo = hub.readable(request)
    author = {"authors": [{"user": repo.owner}]}
    return json_reply(
        [
            {"id": commit.sha, "title": commit.message, "message": commit.description, "date": commit.date, **author}
            for commit in repo.history(request.params["rev"])
        ]
    )


def _create_branch(hub: HubState, request: Request) -> Reply:
    repo, name = hub.writable(request, NO_RIGHTS), request.params["rev"]
    if name.startswith("refs/"):
        raise Refusal(400, f"Invalid reference for a branch: {name}")
    if name in repo.branches:
        raise Refusal(409, f"Reference already exists: {name}")
    repo.branches[name] = repo.resolve(request.json().get("startingPoint") or "main").sha
    return json_reply({})


def _create_tag(hub: HubState, request: Request) -> Reply:
    repo, name = hub.writable(request, NO_RIGHTS), request.json()["tag"]
    if name in repo.tags:
        raise Refusal(409, f"Tag reference exists already: {name}")
    repo.tags[name] = repo.resolve(request.params["rev"]).sha
    return json_reply({})


def _delete_branch(hub: HubState, request: Request) -> Reply:
    repo, name = hub.writable(request, NO_RIGHTS), request.params["rev"]
    if name == "main":
        raise Refusal(403, "The main branch cannot be deleted")
    if name not in repo.branches:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    del repo.branches[name]
    return json_reply({})


def _delete_tag(hub: HubState, request: Request) -> Reply:
    repo, name = hub.writable(request, NO_RIGHTS), request.params["rev"]
    if name not in repo.tags:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    del repo.tags[name]
    return json_reply({})


# ---- reading files ---------------------------------------------------------------------------------


def _lfs_entry(blob: Blob) -> dict[str, Any]:
    """Return the ``lfs`` part of a listing; empty for a file that is not stored by LFS."""
    about = {"oid": blob.sha256, "sha256": blob.sha256, "size": len(blob.data), "pointerSize": 134}
    return {"lfs": about} if blob.lfs else {}


def _tree_entries(tree: dict[str, Blob]) -> dict[str, dict[str, Any]]:
    """Return path to listing entry, of the files and of the folders that hold them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(tree.items()):
        for parent in [str(p) for p in PurePosixPath(path).parents][:-1]:
            oid = hashlib.sha1(parent.encode()).hexdigest()
            entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": oid}
        entries[path] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
        entries[path] |= _lfs_entry(blob)
    return entries


def _list_tree(hub: HubState, request: Request) -> Reply:
    tree = hub.readable(request).resolve(request.params["rev"]).tree
    folder = request.params["path"].strip("/")
    prefix = f"{folder}/" if folder else ""
    inside = [entry for path, entry in sorted(_tree_entries(tree).items()) if path.startswith(prefix)]
    if folder and not inside:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    if not _is_true(request, "recursive"):
        inside = [entry for entry in inside if "/" not in entry["path"].removeprefix(prefix)]
    return json_reply(inside)


def _paths_info(hub: HubState, request: Request) -> Reply:
    """List the named paths that exist; the others are left out."""
    entries = _tree_entries(hub.readable(request).resolve(request.params["rev"]).tree)
    wanted = parse_qs(request.body.decode()).get("paths", [])
    return json_reply([entries[path.rstrip("/")] for path in wanted if path.rstrip("/") in entries])


def _resolve_file(hub: HubState, request: Request) -> Reply:
    commit = hub.readable(request).resolve(request.params["rev"])
    blob = commit.tree.get(request.params["path"])
    if blob is None:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    return _part_of(blob.data, request.headers.get("Range"), headers)


def _part_of(data: bytes, wanted: str | None, headers: dict[str, str]) -> Reply:
    """Answer with all of ``data`` or, where one range of bytes is asked for, with that part."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if match is None or match.groups() == ("", ""):
        return Reply(data, 200, headers)
    first, last = match.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        return Reply(b"", 416, headers | {"Content-Range": f"bytes */{len(data)}"})
    return Reply(data[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


# ---- writing files ---------------------------------------------------------------------------------


def _preupload(hub: HubState, request: Request) -> Reply:
    """Say how to send each file, and the oid of what is there, so that the client skips what is equal.

    Who may only read may ask this too, since the files may be meant for a pull request.
    """
    tree = hub.readable(request).resolve(request.params["rev"]).tree
    hub.signed_in(request)
    answers = []
    for file in request.json()["files"]:
        path = file["path"]
        binary = b"\0" in base64.b64decode(file["sample"])
        lfs = binary or file["size"] > LFS_SIZE or path.endswith(LFS_SUFFIXES)
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        answers.append(answer | ({"oid": tree[path].etag} if path in tree else {}))
    return json_reply({"files": answers})


def _lfs_batch(hub: HubState, request: Request) -> Reply:
    repo, objects = hub.writable(request, NO_LFS), []
    for wanted in request.json()["objects"]:
        put = {"href": f"{hub.url}/lfs-objects/{repo.repo_id}/{wanted['oid']}"}
        verify = {"href": f"{hub.url}/{repo.repo_id}.git/info/lfs/objects/verify"}
        actions = {} if wanted["oid"] in repo.lfs_objects else {"actions": {"upload": put, "verify": verify}}
        objects.append(wanted | actions)
    return json_reply({"transfer": "basic", "objects": objects})


def _put_lfs_object(hub: HubState, request: Request) -> Reply:
    """Store an object; the address is the permission, as with the signed addresses of the Hub's storage."""
    oid = hashlib.sha256(request.body).hexdigest()
    if oid != request.params["oid"]:
        raise Refusal(400, f"the content has sha256 {oid}, not {request.params['oid']}")
    hub.repos[request.params["repo"]].lfs_objects[oid] = request.body
    return Reply()


def _verify_lfs_object(hub: HubState, request: Request) -> Reply:
    stored = hub.writable(request, NO_LFS).lfs_objects.get(request.json()["oid"])
    if stored is None or len(stored) != request.json()["size"]:
        raise Refusal(404, "Object not found")
    return json_reply({})


def _commit(hub: HubState, request: Request) -> Reply:
    repo, branch = hub.writable(request, NO_PUSH), request.params["rev"]
    if request.query.get("create_pr"):
        raise Refusal(501, "the Hub stand-in has no pull requests")
    if branch not in repo.branches:
        raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    header, *operations = [json.loads(line) for line in request.body.splitlines() if line]
    if header["value"].get("parentCommit") not in (None, repo.branches[branch]):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    tree = dict(repo.resolve(branch).tree)
    for operation in operations:
        _apply(repo, tree, operation["key"], operation["value"])
    commit = repo.add_commit(branch, header["value"]["summary"], tree, header["value"].get("description", ""))
    url = f"{hub.url}/{repo.repo_id}/commit/{commit.sha}"
    return json_reply({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})


def _apply(repo: Repo, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    """Apply one line of a commit to ``tree``, in place."""
    path = value["path"]
    if key == "file":
        tree[path] = Blob(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in repo.lfs_objects:
            raise Refusal(400, f"LFS object {value['oid']} of {path} was never uploaded")
        tree[path] = Blob(repo.lfs_objects[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        prefix = path.rstrip("/") + "/"
        gone = [p for p in tree if (p.startswith(prefix) if key == "deletedFolder" else p == path)]
        if not gone:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        for p in gone:
            del tree[p]
    else:
        raise Refusal(501, f"the Hub stand-in has no commit operation {key!r}")


# ---- the table -------------------------------------------------------------------------------------

_REPO = r"(?P<repo>[^/]+/[^/]+|[^/]+)"
_API = "/api/models/" + _REPO
_LFS = "/" + _REPO + r"\.git/info/lfs/objects"
_REV = r"(?P<rev>[^/]+)"
Route = Callable[[HubState, Request], Reply]
ROUTES: list[tuple[str, str, re.Pattern[str], Route]] = [
    (kind, verb, re.compile(pattern), route)
    for kind, verb, pattern, route in [
        ("whoami", "GET", "/api/whoami-v2", _who_am_i),
        ("create", "POST", "/api/repos/create", _create_repo),
        ("delete", "DELETE", "/api/repos/delete", _delete_repo),
        ("settings", "PUT", f"{_API}/settings", _change_settings),
        ("auth_check", "GET", f"{_API}/auth-check(?P<write>/write)?", _auth_check),
        ("validate_yaml", "POST", "/api/validate-yaml", _validate_yaml),
        ("refs", "GET", f"{_API}/refs", _list_refs),
        ("commits", "GET", f"{_API}/commits/{_REV}", _list_commits),
        ("info", "GET", f"{_API}/revision/{_REV}", _repo_info),
        ("info", "GET", _API, _repo_info),
        ("branch", "POST", f"{_API}/branch/{_REV}", _create_branch),
        ("branch", "DELETE", f"{_API}/branch/{_REV}", _delete_branch),
        ("tag", "POST", f"{_API}/tag/{_REV}", _create_tag),
        ("tag", "DELETE", f"{_API}/tag/{_REV}", _delete_tag),
        ("tree", "GET", f"{_API}/tree/{_REV}(?P<path>/.*)?", _list_tree),
        ("paths_info", "POST", f"{_API}/paths-info/{_REV}", _paths_info),
        ("preupload", "POST", f"{_API}/preupload/{_REV}", _preupload),
        ("commit", "POST", f"{_API}/commit/{_REV}", _commit),
        ("lfs_batch", "POST", f"{_LFS}/batch", _lfs_batch),
        ("lfs_verify", "POST", f"{_LFS}/verify", _verify_lfs_object),
        ("lfs_put", "PUT", f"/lfs-objects/{_REPO}/(?P<oid>[0-9a-f]{{64}})", _put_lfs_object),
        ("file_info", "HEAD", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", _resolve_file),
        ("download", "GET", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", _resolve_file),
    ]
]
KINDS = tuple(dict.fromkeys(kind for kind, *_ in ROUTES))
