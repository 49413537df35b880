"""The Hub stand-in against unmodified huggingface_hub and Transformers, each client in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def run_client(hub: HubStandIn, home: Path, script: str, *arguments: str, **variables: str) -> Any:
    """Run ``script`` in a new process with an empty cache; return what its last line of output holds."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=hub.environment(home, **variables),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None


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
    pushed = run_client(hub, tmp_path / "pusher", UPLOAD, str(folder))
    assert pushed["repo_id"] == "user/folder"
    assert sorted(pushed["files"]) == sorted(expected)
    assert hub.files("user/folder") == expected
    # The binary and the long file went as LFS objects, the small ones inside the commit.
    assert sum(line.startswith("PUT /lfs-objects/") for line in hub.requests) == 2

    for name, revision in {"branch": [], "sha": [pushed["sha"]]}.items():
        snapshot = Path(run_client(hub, tmp_path / name, SNAPSHOT, *revision))
        assert snapshot.name == pushed["sha"]
        assert {str(p.relative_to(snapshot)): p.read_bytes() for p in snapshot.rglob("*") if p.is_file()} == expected


def test_missing_things_raise_the_errors_of_the_client(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    run_client(hub, tmp_path / "pusher", UPLOAD, str(folder))
    seen = run_client(hub, tmp_path / "reader", ERRORS)
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
    seen = run_client(hub, tmp_path / "home", COMMITS)
    assert seen["texts"] == {"first": "one", "second": "two", "main": "two", "v1": "one", "side/line": "side"}
    assert seen["first"] != seen["second"]
    assert seen["unchanged"] == seen["second"]  # the client skips a commit that changes nothing
    assert [commit.message for commit in hub.history("user/history")] == ["two", "one", "initial commit"]
    assert sorted(hub.files("user/history", seen["first"])) == ["old.txt", "sub/note.txt"]
    assert sorted(hub.files("user/history")) == ["sub/note.txt"]


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("create_repo('user/new')", id="create"),
        pytest.param("upload_file(repo_id='user/old', path_in_repo='x', path_or_fileobj=b'x')", id="upload"),
    ],
)
def test_another_token_may_not_write(hub: HubStandIn, tmp_path: Path, call: str) -> None:
    run_client(hub, tmp_path / "owner", "from huggingface_hub import HfApi; HfApi().create_repo('user/old')")
    script = f"""
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
try:
    HfApi().{call}
    print("null")
except HfHubHTTPError as error:
    print(error.response.status_code)
"""
    assert run_client(hub, tmp_path / "stranger", script, HF_TOKEN="hf_other") == 401
    assert hub.files("user/old") == {}


def test_a_private_repository_is_hidden_from_others(hub: HubStandIn, tmp_path: Path) -> None:
    create = "from huggingface_hub import HfApi; HfApi().create_repo('user/secret', private=True)"
    run_client(hub, tmp_path / "owner", create)
    ask = "from huggingface_hub import HfApi; print(str(HfApi().repo_exists('user/secret')).lower())"
    assert run_client(hub, tmp_path / "owner", ask) is True
    assert run_client(hub, tmp_path / "stranger", ask, HF_TOKEN="hf_other") is False


def test_transformers_pushes_and_loads_remote_code(hub: HubStandIn, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "tiny_model.py").write_text(TINY_MODEL)
    run_client(hub, tmp_path / "pusher", PUSH_MODEL, PYTHONPATH=str(code))
    assert {"config.json", "model.safetensors", "tiny_model.py"} <= hub.files("user/tiny").keys()

    newest, first, _ = hub.history("user/tiny")
    assert (newest.message, first.message) == ("scale 2.0", "scale 1.0")
    scales = run_client(hub, tmp_path / "loader", LOAD_MODEL, first.sha, newest.sha)
    assert scales == [[2.0, 2.0], [1.0, 1.0], [2.0, 2.0]]
