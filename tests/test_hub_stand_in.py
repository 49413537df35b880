"""The Hub stand-in against unmodified huggingface_hub and Transformers, each client in its own process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import LFS_SIZE, HubStandIn

UPLOAD = """
import json, sys
from huggingface_hub import HfApi
api = HfApi()
repo_id = api.create_repo("folder").repo_id
assert api.create_repo("folder", exist_ok=True).repo_id == repo_id
sha = api.upload_folder(repo_id=repo_id, folder_path=sys.argv[1], commit_message="first").oid
print(json.dumps({"repo_id": repo_id, "sha": sha, "files": api.list_repo_files(repo_id)}))
"""

SNAPSHOT = """
import json, sys
from huggingface_hub import snapshot_download
revision = sys.argv[1] if len(sys.argv) > 1 else None
print(json.dumps(snapshot_download("user/folder", revision=revision)))
"""

ERRORS = """
import json
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
calls = {
    "file": lambda: hf_hub_download("user/folder", "missing.txt"),
    "repository": lambda: hf_hub_download("user/none", "note.txt"),
    "repository snapshot": lambda: snapshot_download("user/none"),
    "revision": lambda: hf_hub_download("user/folder", "note.txt", revision="none"),
    "revision snapshot": lambda: snapshot_download("user/folder", revision="none"),
    "folder of tree": lambda: list(HfApi().list_repo_tree("user/folder", "none")),
    "commit without repository": lambda: HfApi().upload_file(
        repo_id="user/none", path_or_fileobj=b"x", path_in_repo="x"
    ),
}
seen = {}
for name, call in calls.items():
    try:
        call()
        seen[name] = []
    except Exception as error:
        seen[name] = [kind.__name__ for kind in type(error).__mro__]
print(json.dumps(seen))
"""

COMMITS = """
import json
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
api = HfApi()
repo_id = api.create_repo("user/history").repo_id
def commit(text, *more):
    operations = [CommitOperationAdd("sub/note.txt", text.encode()), *more]
    return api.create_commit(repo_id, operations, commit_message=text).oid
first = commit("one", CommitOperationAdd("old.txt", b"old"))
second = commit("two", CommitOperationDelete("old.txt"))
unchanged = commit("two")
api.create_tag(repo_id, tag="v1", revision=first)
api.create_branch(repo_id, branch="side/line", revision=first)
api.upload_file(repo_id=repo_id, path_or_fileobj=b"side", path_in_repo="sub/note.txt", revision="side/line")
def read(revision):
    return open(hf_hub_download(repo_id, "sub/note.txt", revision=revision)).read()
revisions = {"first": first, "second": second, "main": "main", "v1": "v1", "side/line": "side/line"}
texts = {name: read(revision) for name, revision in revisions.items()}
print(json.dumps({"first": first, "second": second, "unchanged": unchanged, "texts": texts}))
"""

TINY_MODEL = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

class TinyConfig(PreTrainedConfig):
    model_type = "tiny-of-the-stand-in"
    width: int = 3

class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.zeros(config.width))
        self.post_init()

    def forward(self, values):
        return values * self.scale
"""

PUSH_MODEL = """
import torch
from tiny_model import TinyConfig, TinyModel
TinyConfig.register_for_auto_class()
TinyModel.register_for_auto_class("AutoModel")
model = TinyModel(TinyConfig(width=2))
for value in (1.0, 2.0):
    torch.nn.init.constant_(model.scale, value)
    model.push_to_hub("user/tiny", commit_message=f"scale {value}")
"""

LOAD_MODEL = """
import json, sys
from transformers import AutoModel
revisions = [None, *sys.argv[1:]]
models = [AutoModel.from_pretrained("user/tiny", trust_remote_code=True, revision=r) for r in revisions]
print(json.dumps([model.scale.tolist() for model in models]))
"""


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a small text, a text over the limit of a commit, a small binary and an empty file."""
    path = tmp_path / "folder"
    (path / "sub").mkdir(parents=True)
    (path / "note.txt").write_text("a small file\n")
    (path / "sub" / "long.txt").write_bytes(b"0123456789abcde\n" * (LFS_SIZE // 16 + 1))
    (path / "model.safetensors").write_bytes(bytes(range(256)))
    (path / "empty.json").write_bytes(b"")
    return path


def test_uploads_a_folder_and_downloads_the_same_bytes(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    expected = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    pushed = hub.run(UPLOAD, tmp_path / "pusher", str(folder))
    assert pushed["repo_id"] == "user/folder"
    assert sorted(pushed["files"]) == sorted(expected)
    assert hub.files("user/folder") == expected
    # The binary and the long file went as LFS objects, the small ones inside the commit.
    assert [request.kind for request in hub.requests].count("lfs_put") == 2

    for name, revision in {"branch": [], "sha": [pushed["sha"]]}.items():
        snapshot = Path(hub.run(SNAPSHOT, tmp_path / name, *revision))
        assert snapshot.name == pushed["sha"]
        assert {str(p.relative_to(snapshot)): p.read_bytes() for p in snapshot.rglob("*") if p.is_file()} == expected


def test_missing_things_raise_the_errors_of_the_client(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    hub.run(UPLOAD, tmp_path / "pusher", str(folder))
    seen = hub.run(ERRORS, tmp_path / "reader")
    expected = {
        "file": "EntryNotFoundError",
        "repository": "RepositoryNotFoundError",
        "repository snapshot": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
        "revision snapshot": "RevisionNotFoundError",
        "folder of tree": "EntryNotFoundError",
        "commit without repository": "RepositoryNotFoundError",
    }
    assert seen.keys() == expected.keys()
    assert [name for name, error in expected.items() if error not in seen[name]] == []


def test_each_commit_stays_reachable_by_its_sha(hub: HubStandIn, tmp_path: Path) -> None:
    seen = hub.run(COMMITS, tmp_path / "home")
    assert seen["texts"] == {"first": "one", "second": "two", "main": "two", "v1": "one", "side/line": "side"}
    assert seen["first"] != seen["second"]
    assert seen["unchanged"] == seen["second"]  # the client skips a commit that changes nothing
    assert [commit.message for commit in hub.commits("user/history")] == ["two", "one", "initial commit"]
    assert sorted(hub.files("user/history", seen["first"])) == ["old.txt", "sub/note.txt"]
    assert sorted(hub.files("user/history")) == ["sub/note.txt"]


BRANCHES = """
import json, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
api = HfApi()
repo_id = api.create_repo("user/branches").repo_id
first = api.create_commit(repo_id, [CommitOperationAdd("a.txt", b"1")], commit_message="first").oid
api.create_branch(repo_id, branch="next")
api.create_branch(repo_id, branch="next", exist_ok=True)
api.create_tag(repo_id, tag="v1", revision=first[:7])
second = api.create_commit(
    repo_id, [CommitOperationAdd("a.txt", b"2")], commit_message="second", commit_description="more", revision="next"
).oid
refs = api.list_repo_refs(repo_id, include_pull_requests=True)
seen = {
    "first": first,
    "second": second,
    "branches": {ref.name: [ref.ref, ref.target_commit] for ref in refs.branches},
    "tags": {ref.name: [ref.ref, ref.target_commit] for ref in refs.tags},
    "commits": [[c.commit_id, c.title, c.message] for c in api.list_repo_commits(repo_id, revision="next")],
    "sha": [api.repo_info(repo_id, revision=r).sha for r in (None, "next", "v1", second)],
    "exists": [api.revision_exists(repo_id, r) for r in ("next", "v1", "none")],
}
api.delete_tag(repo_id, tag="v1")
api.delete_branch(repo_id, branch="next")
print(json.dumps(seen))
"""


def test_branches_and_tags_name_commits(hub: HubStandIn, tmp_path: Path) -> None:
    seen = hub.run(BRANCHES, tmp_path / "home")
    first, second = seen["first"], seen["second"]
    assert seen["branches"] == {"main": ["refs/heads/main", first], "next": ["refs/heads/next", second]}
    assert seen["tags"] == {"v1": ["refs/tags/v1", first]}
    assert [commit[1:] for commit in seen["commits"]] == [["second", "more"], ["first", ""], ["initial commit", ""]]
    assert [commit[0] for commit in seen["commits"]][:2] == [second, first]
    assert seen["sha"] == [first, second, first, second]
    assert seen["exists"] == [True, True, False]
    assert (hub.branches("user/branches"), hub.tags("user/branches")) == ({"main": first}, {})
    assert hub.read("user/branches", "a.txt") == b"1"
    assert hub.read("user/branches", "a.txt", revision=second) == b"2"  # reachable by its sha without the branch


DELETIONS = """
import json, sys
from huggingface_hub import CommitOperationDelete, HfApi
api = HfApi()
upload = dict(repo_id="user/folder", folder_path=sys.argv[1])
api.upload_folder(**upload, delete_patterns=["old/*", "*.safetensors", "note.txt"])
after_patterns = api.list_repo_files("user/folder")
tree = {entry.path: type(entry).__name__ for entry in api.list_repo_tree("user/folder")}
paths = [entry.path for entry in api.get_paths_info("user/folder", ["sub", "note.txt", "none"])]
api.delete_folder("sub/", "user/folder")
errors = []
for name in ("none.txt", "sub"):
    try:
        api.delete_file(name, "user/folder")
    except Exception as error:
        errors.append(type(error).__name__)
print(json.dumps([after_patterns, tree, paths, errors]))
"""


def test_files_and_folders_are_deleted_in_a_commit(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    hub.run(UPLOAD, tmp_path / "home", str(folder))
    hub.commit("user/folder", {"old/weights.bin": b"\0", "old/a/b.txt": b"b", "kept.txt": b"kept"})
    (folder / "model.safetensors").unlink()
    left, tree, paths, errors = hub.run(DELETIONS, tmp_path / "home", str(folder))
    assert sorted(left) == ["empty.json", "kept.txt", "note.txt", "sub/long.txt"]
    kinds = {"empty.json": "RepoFile", "kept.txt": "RepoFile", "note.txt": "RepoFile", "sub": "RepoFolder"}
    assert tree == kinds
    assert paths == ["sub", "note.txt"]
    assert errors == ["RemoteEntryNotFoundError"] * 2
    assert sorted(hub.files("user/folder")) == ["empty.json", "kept.txt", "note.txt"]
    # Upload, the other client's commit, the patterns and the folder: one commit each, and none for an error.
    assert len(hub.commits("user/folder")) == 1 + 4


CARDS = """
import json, warnings
from huggingface_hub import HfApi, ModelCard
api = HfApi()
api.create_repo("user/card")
def push(metadata):
    text = f"---\\n{metadata}\\n---\\n# Title\\n" if metadata else "# Title\\n"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            api.upload_file(repo_id="user/card", path_in_repo="README.md", path_or_fileobj=text.encode())
        except ValueError as error:
            return str(error)[:160]
    return [str(w.message) for w in caught if "metadata" in str(w.message)]
result = "model-index: [{name: m, results: [{task: {type: t}, dataset: {type: d}, metrics: [{type: f1}]}]}]"
cases = {
    "none": None,
    "broken": "license: [mit",
    "list": "- mit",
    "license": "license: Apache 2.0",
    "license type": "license: [{a: b}]",
    "tags": "tags: prm",
    "index": result,
}
seen = {name: push(metadata) for name, metadata in cases.items()}
seen["good"] = push("license: mit\\ndate: 2026-01-31\\ntags: [prm]\\nlibrary_name: transformers")
info = api.model_info("user/card")
seen["info"] = [info.card_data.license, info.tags, info.library_name]
seen["expand"] = api.model_info("user/card", expand=["cardData"]).tags
try:
    ModelCard("---\\nlicense: none\\n---\\n").validate()
except ValueError as error:
    seen["validate"] = str(error)[:36]
print(json.dumps(seen))
"""


def test_bad_metadata_of_a_card_stops_a_push(hub: HubStandIn, tmp_path: Path) -> None:
    seen = hub.run(CARDS, tmp_path / "home")
    start = "Invalid metadata in README.md.\n- "
    assert seen["none"] == [
        "Warnings while validating metadata in README.md:\n- empty or missing yaml metadata in repo card"
    ]
    assert seen["broken"].startswith(start + "bad YAML: ")
    assert seen["list"] == start + '"metadata" must be of type object'
    assert seen["license"].startswith(start + '"license" must be one of [')
    assert seen["license type"] == seen["license"]
    assert seen["tags"] == start + '"tags" must be an array of strings'
    place = "model-index[0].results[0]"
    assert seen["index"] == f'{start}"{place}.dataset.name" is required\n- "{place}.metrics[0].value" is required'
    assert (seen["good"], seen["info"]) == ([], ["mit", ["prm"], "transformers"])
    assert seen["expand"] is None
    assert seen["validate"] == '- Error: "license" must be one of [a'
    assert len(hub.commits("user/card")) == 1 + 2  # of the eight only the one without metadata and the good one


RANGES = """
import json
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session
url = hf_hub_url("user/ranges", "model.bin")
seen = []
for wanted in ("bytes=2-4", "bytes=7-", "bytes=-3", "bytes=8-99", "bytes=10-", "bytes=-"):
    answer = get_session().get(url, headers=build_hf_headers() | {"Range": wanted})
    seen.append([answer.status_code, answer.text, answer.headers.get("Content-Range")])
about = get_hf_file_metadata(url)
print(json.dumps([seen, about.size, about.commit_hash]))
"""


def test_parts_of_a_file(hub: HubStandIn, tmp_path: Path) -> None:
    hub.run("from huggingface_hub import create_repo; create_repo('user/ranges')", tmp_path / "home")
    sha = hub.commit("user/ranges", {"model.bin": b"0123456789"})
    parts, size, commit = hub.run(RANGES, tmp_path / "home")
    assert parts == [
        [206, "234", "bytes 2-4/10"],
        [206, "789", "bytes 7-9/10"],
        [206, "789", "bytes 7-9/10"],
        [206, "89", "bytes 8-9/10"],
        [416, "", "bytes */10"],
        [200, "0123456789", None],
    ]
    assert (size, commit) == (10, sha)


def test_transformers_pushes_and_loads_remote_code(hub: HubStandIn, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "tiny_model.py").write_text(TINY_MODEL)
    hub.run(PUSH_MODEL, tmp_path / "pusher", PYTHONPATH=str(code))
    assert {"config.json", "model.safetensors", "tiny_model.py"} <= hub.files("user/tiny").keys()

    newest, first, _ = hub.commits("user/tiny")
    assert (newest.message, first.message) == ("scale 2.0", "scale 1.0")
    scales = hub.run(LOAD_MODEL, tmp_path / "loader", first.sha, newest.sha)
    assert scales == [[2.0, 2.0], [1.0, 1.0], [2.0, 2.0]]
