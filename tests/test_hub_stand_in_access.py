"""Tokens, private repositories and rights on the Hub stand-in, as unmodified huggingface_hub meets them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import HubStandIn


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as server:
        yield server


ACCESS = """
import json, sys
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, whoami
api = HfApi()
def commit(name, repo_id):
    return lambda: api.create_commit(repo_id, [CommitOperationAdd(name, bytes(1))], commit_message="new").oid
def read(repo_id):
    return lambda: open(hf_hub_download(repo_id, "note.txt")).read()
calls = {
    "who": lambda: [whoami()["name"], whoami()["auth"]["accessToken"]["role"]],
    "create": lambda: api.create_repo("user/new", private=True).repo_id,
    "create again": lambda: api.create_repo("user/public", exist_ok=True).repo_id,
    "branch": lambda: api.create_branch("user/public", branch=sys.argv[1]) or "done",
    "exists": lambda: [api.repo_exists("user/public"), api.repo_exists("user/secret")],
    "list": lambda: api.list_repo_files("user/secret"),
    "read": read("user/secret"),
    "read public": read("user/public"),
    "commit text": commit("new.txt", "user/secret"),
    "commit binary": commit("new.bin", "user/public"),
    "commit public": lambda: api.upload_file(
        repo_id="user/public", path_in_repo="new.txt", path_or_fileobj=sys.argv[1].encode()).oid,
}
seen = {}
for name, call in calls.items():
    try:
        seen[name] = call()
    except Exception as error:
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        seen[name] = [type(error).__name__, response and response.status_code]
print(json.dumps(seen))
"""
MISSING, FORBIDDEN, UNSIGNED = "RepositoryNotFoundError", ["HfHubHTTPError", 403], ["HfHubHTTPError", 401]


def test_who_may_do_what(hub: HubStandIn, tmp_path: Path) -> None:
    """The owner may all; a token to read and a stranger get 403, what is hidden is not found, a wrong token is 401."""
    create = "from huggingface_hub import create_repo as c; c('user/public'); c('user/secret', private=True)"
    hub.run(create, tmp_path / "owner")
    assert (hub.is_private("user/public"), hub.is_private("user/secret")) == (False, True)
    for repo_id in hub.repositories:
        hub.commit(repo_id, {"note.txt": b"text"})

    tokens = {"read": hub.read_token, "stranger": hub.stranger_token, "wrong": "hf_wrong", "none": ""}
    seen = {name: hub.run(ACCESS, tmp_path / name, name, HF_TOKEN=token) for name, token in tokens.items()}
    assert hub.repositories == ["user/public", "user/secret"]
    assert {repo_id: len(hub.commits(repo_id)) for repo_id in hub.repositories} == {"user/public": 2, "user/secret": 2}
    assert hub.branches("user/public").keys() == {"main"}

    assert seen["read"] == {
        "who": ["user", "read"],
        "create": FORBIDDEN,
        "create again": "user/public",  # the client looks whether it is there
        "branch": FORBIDDEN,
        "exists": [True, True],
        "list": ["note.txt"],
        "read": "text",
        "read public": "text",
        "commit text": FORBIDDEN,
        "commit binary": FORBIDDEN,
        "commit public": FORBIDDEN,
    }
    hidden = {"exists": [True, False], "list": [MISSING, 404], "read": [MISSING, 404], "commit text": [MISSING, 404]}
    assert seen["stranger"] == seen["read"] | {"who": ["stranger", "write"]} | hidden
    assert seen["wrong"] == dict.fromkeys(seen["read"], UNSIGNED)
    # Without a token every 401 about a repository is "not found" to the client, also where the repository is public.
    about_a_repository = ("branch", "list", "read", "commit text", "commit binary", "commit public")
    unsigned = {name: [MISSING, 401] for name in about_a_repository} | {"create": UNSIGNED}
    assert seen["none"] == seen["stranger"] | unsigned | {"who": ["LocalTokenNotFoundError", None]}

    owner = hub.run(ACCESS, tmp_path / "owner", "by-owner")
    assert owner["who"] == ["user", "write"]
    assert [owner[name] for name in ("create", "exists", "read")] == ["user/new", [True, True], "text"]
    assert owner["commit text"] == hub.branches("user/secret")["main"]
    assert hub.branches("user/public").keys() == {"main", "by-owner"}


SETTINGS = """
import json
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("user/gone")
api.delete_repo("user/gone")
api.delete_repo("user/gone", missing_ok=True)
api.create_repo("user/kept")
api.update_repo_settings("user/kept", private=True)
api.auth_check("user/kept", write=True)
print(json.dumps([api.repo_exists("user/gone"), api.repo_info("user/kept").private]))
"""


def test_repositories_are_deleted_and_made_private(hub: HubStandIn, tmp_path: Path) -> None:
    assert hub.run(SETTINGS, tmp_path / "home") == [False, True]
    assert hub.repositories == ["user/kept"]


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("create_repo('user/new')", id="create"),
        pytest.param("upload_file(repo_id='user/old', path_in_repo='x', path_or_fileobj=b'x')", id="upload"),
    ],
)
def test_a_wrong_token_may_not_write(hub: HubStandIn, tmp_path: Path, call: str) -> None:
    hub.run("from huggingface_hub import HfApi; HfApi().create_repo('user/old')", tmp_path / "owner")
    script = f"""
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
try:
    HfApi().{call}
    print("null")
except HfHubHTTPError as error:
    print(error.response.status_code)
"""
    assert hub.run(script, tmp_path / "stranger", HF_TOKEN="hf_other") == 401
    assert hub.files("user/old") == {}
