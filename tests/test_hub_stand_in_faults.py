"""The faults of the Hub stand-in, as unmodified huggingface_hub meets them, each client in its own process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import HubStandIn

REPO = "user/model"

PUSH = """
import json, sys
from huggingface_hub import CommitOperationAdd, HfApi
api = HfApi()
try:
    repo_id = api.create_repo("user/model", exist_ok=True).repo_id
    files = {"note.txt": b"new", "model.safetensors": bytes(range(256)) * 4096}
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    print(json.dumps([api.create_commit(repo_id, operations, commit_message="new").oid]))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""

COMMIT_ON_PARENT = """
import json, sys
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
operations = [CommitOperationAdd("note.txt", b"mine")]
try:
    parent = sys.argv[1] or None
    print(json.dumps(HfApi().create_commit("user/model", operations, commit_message="mine", parent_commit=parent).oid))
except HfHubHTTPError as error:
    print(json.dumps([error.response.status_code, error.server_message]))
"""

DOWNLOAD = """
import hashlib, json
from huggingface_hub import snapshot_download
folder = snapshot_download("user/model")
print(json.dumps(hashlib.sha256(open(folder + "/model.bin", "rb").read()).hexdigest()))
"""

TIMED_HEAD = """
import json, time
from huggingface_hub import get_hf_file_metadata, hf_hub_url
start = time.monotonic()
try:
    found = get_hf_file_metadata(hf_hub_url("user/model", "note.txt"), timeout=float(__import__("sys").argv[1])).etag
except Exception as error:
    found = type(error).__name__
print(json.dumps([found, time.monotonic() - start]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    """A Hub with one repository that holds one commit beside the first, empty one."""
    with HubStandIn() as server:
        server.run("from huggingface_hub import create_repo; create_repo('user/model')", tmp_path / "owner")
        server.commit(REPO, {"note.txt": b"old"}, message="good")
        server.requests.clear()
        yield server


def statuses(hub: HubStandIn, kind: str) -> list[int | None]:
    return [request.status for request in hub.requests if request.kind == kind]


@pytest.mark.parametrize(
    ("kind", "status"), [("preupload", 503), ("lfs_batch", 500), ("lfs_put", 503), ("lfs_verify", 502)]
)
def test_client_repeats_an_upload_call_after_one_error(hub: HubStandIn, tmp_path: Path, kind: str, status: int) -> None:
    hub.fail(kind, status)
    assert len(hub.unused_faults) == 1
    (sha,) = hub.run(PUSH, tmp_path / "home")
    assert hub.unused_faults == []
    assert statuses(hub, kind) == [status, 200]
    assert [commit.sha for commit in hub.commits(REPO)][:1] == [sha]
    assert hub.read(REPO, "model.safetensors") == bytes(range(256)) * 4096


@pytest.mark.parametrize(("kind", "status"), [("create", 503), ("commit", 500)])
def test_failed_push_leaves_the_last_good_commit(hub: HubStandIn, tmp_path: Path, kind: str, status: int) -> None:
    hub.fail(kind, status)
    name, message = hub.run(PUSH, tmp_path / "home")
    assert name == "HfHubHTTPError"
    assert f"Server error '{status} " in message
    assert statuses(hub, kind) == [status]
    assert [commit.message for commit in hub.commits(REPO)] == ["good", "initial commit"]
    assert hub.files(REPO) == {"note.txt": b"old"}

    hub.run(PUSH, tmp_path / "home")
    assert [commit.message for commit in hub.commits(REPO)] == ["new", "good", "initial commit"]
    assert hub.files(REPO) == {"note.txt": b"new", "model.safetensors": bytes(range(256)) * 4096}


def test_a_fault_strikes_as_often_as_asked_and_only_where_its_path_fits(hub: HubStandIn, tmp_path: Path) -> None:
    hub.fail("commit", times=2, path=REPO)
    hub.fail("commit", path="user/other")
    outcomes = [len(hub.run(PUSH, tmp_path / "home")) for _ in range(3)]
    assert outcomes == [2, 2, 1]  # an error's name and message twice, then a sha
    assert hub.unused_faults == ["fail on commit of user/other, 1 left"]


def test_upload_cut_in_the_middle_is_repeated_whole(hub: HubStandIn, tmp_path: Path) -> None:
    hub.cut_upload(after=300_000)  # of 1,048,576
    assert len(hub.run(PUSH, tmp_path / "home")) == 1
    assert statuses(hub, "lfs_put") == [None, 200]
    assert hub.read(REPO, "model.safetensors") == bytes(range(256)) * 4096


def test_commit_cut_in_the_middle_changes_nothing(hub: HubStandIn, tmp_path: Path) -> None:
    hub.cut_upload("commit", after=100)
    name, _ = hub.run(PUSH, tmp_path / "home")
    assert name in ("ReadError", "WriteError", "RemoteProtocolError")
    assert statuses(hub, "commit") == [None]
    assert hub.files(REPO) == {"note.txt": b"old"}
    assert len(hub.commits(REPO)) == 2


def test_commit_whose_answer_is_lost_is_made_once(hub: HubStandIn, tmp_path: Path) -> None:
    hub.lose_answer("commit")
    name, _ = hub.run(PUSH, tmp_path / "home")
    assert name == "RemoteProtocolError"
    made = hub.commits(REPO)
    assert [commit.message for commit in made] == ["new", "good", "initial commit"]
    assert hub.run(PUSH, tmp_path / "home") == [made[0].sha]  # everything is there, so nothing is committed again
    assert len(hub.commits(REPO)) == 3


def test_another_commit_in_between_is_412_for_a_commit_on_its_parent(hub: HubStandIn, tmp_path: Path) -> None:
    parent = hub.branches(REPO)["main"]
    hub.commit_between(REPO, {"other.txt": b"theirs"}, delete=["note.txt"])
    refused = hub.run(COMMIT_ON_PARENT, tmp_path / "home", parent)
    assert refused == [412, "A commit has happened since. Please refresh and try again."]
    assert hub.files(REPO) == {"other.txt": b"theirs"}
    assert [commit.message for commit in hub.commits(REPO)] == ["by another client", "good", "initial commit"]

    sha = hub.run(COMMIT_ON_PARENT, tmp_path / "home", hub.branches(REPO)["main"])
    assert hub.commits(REPO)[0].sha == sha
    assert hub.files(REPO) == {"note.txt": b"mine", "other.txt": b"theirs"}


def test_another_commit_in_between_is_kept_below_one_without_a_parent(hub: HubStandIn, tmp_path: Path) -> None:
    hub.commit_between(REPO, {"other.txt": b"theirs"}, before="preupload")
    sha = hub.run(COMMIT_ON_PARENT, tmp_path / "home", "")
    assert [commit.message for commit in hub.commits(REPO)] == ["mine", "by another client", "good", "initial commit"]
    assert hub.files(REPO, sha) == {"note.txt": b"mine", "other.txt": b"theirs"}


@pytest.mark.parametrize(
    ("size", "cut", "resumed_from"),
    [
        pytest.param(100_000, 40_000, 0, id="the client forgets less than its chunk of 10 MiB"),
        pytest.param(12 * 1024 * 1024, 11 * 1024 * 1024, 10 * 1024 * 1024, id="and asks for the rest after one"),
    ],
)
def test_download_cut_in_the_middle_is_resumed(
    hub: HubStandIn, tmp_path: Path, size: int, cut: int, resumed_from: int
) -> None:
    data = hashlib.shake_128(b"content").digest(size)
    hub.commit(REPO, {"model.bin": data})
    hub.cut_download(after=cut, path="model.bin")
    assert hub.run(DOWNLOAD, tmp_path / "home") == hashlib.sha256(data).hexdigest()
    answers = [request.status for request in hub.requests if request[0] == "GET" and "model.bin" in request.path]
    assert answers == [200, 206 if resumed_from else 200]


def test_a_slow_answer_comes_late_or_not_at_all(hub: HubStandIn, tmp_path: Path) -> None:
    etag = hashlib.sha1(b"blob 3\0old").hexdigest()  # git's name of the content
    hub.delay("file_info", 1.0)
    found, seconds = hub.run(TIMED_HEAD, tmp_path / "home", "30")
    assert (found, seconds >= 1.0) == (etag, True)
    hub.delay("file_info", 60.0)
    found, seconds = hub.run(TIMED_HEAD, tmp_path / "home", "0.5")
    assert (found, 0.5 <= seconds < 30.0) == ("ReadTimeout", True)


def test_a_fault_that_cannot_strike_is_refused(hub: HubStandIn) -> None:
    with pytest.raises(ValueError, match=r"no kind of request 'push'; it must be one of .*preupload"):
        hub.fail("push")
    with pytest.raises(ValueError, match="times=0"):
        hub.lose_answer("commit", times=0)


def test_the_log_tells_method_path_status_and_kind_but_no_token(hub: HubStandIn, tmp_path: Path) -> None:
    hub.run(PUSH, tmp_path / "home")
    log = [(request.method, request.path, request.status) for request in hub.requests]
    oid = hashlib.sha256(bytes(range(256)) * 4096).hexdigest()
    assert log == [
        ("POST", "/api/repos/create", 409),
        ("POST", "/api/models/user/model/preupload/main", 200),
        ("POST", "/user/model.git/info/lfs/objects/batch", 200),
        ("PUT", f"/lfs-objects/user/model/{oid}", 200),
        ("POST", "/user/model.git/info/lfs/objects/verify", 200),
        ("POST", "/api/models/user/model/commit/main", 200),
    ]
    kinds = [request.kind for request in hub.requests]
    assert kinds == ["create", "preupload", "lfs_batch", "lfs_put", "lfs_verify", "commit"]
    assert hub.token not in repr(hub.requests)
