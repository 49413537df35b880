"""`python -m hub_card`: publish a saved PRM from the command line; errors are one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from clean_process import CODE_FILES, PROJECT
from hub_client import ClientError, HubClient, shared_client
from hub_stand_in import HubStandIn

from hub_card.__main__ import main

FILES = CODE_FILES | {
    *("README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "LICENSE"),
}


@pytest.fixture(scope="module")
def hub() -> HubStandIn:
    return shared_client()[0]


@pytest.fixture(scope="module")
def client() -> HubClient:
    return shared_client()[1]


@pytest.fixture
def folder(client: HubClient, tmp_path: Path) -> Path:
    """A saved PRM with card data beside it, as training leaves it."""
    folder = Path(shutil.copytree(client.prm, tmp_path / "model"))
    data = {"title": "From the file", "license": "mit", "datasets": ["org/file"], "training": {"learning_rate": 0.5}}
    (folder / "card_data.json").write_text(json.dumps(data))
    return folder


def run(hub: HubStandIn, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a person runs it."""
    environment = hub.environment(home, PYTHONPATH=str(PROJECT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "hub_card", *arguments]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120)


def test_a_saved_model_is_published(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    repo = "user/by-command"
    options = ("--private", "--revision", "v1", "--license", "apache-2.0", "--languages", "en", "fr")
    done = run(hub, tmp_path, "--model", str(folder), "--repo", repo, *options, "--commit-message", "From here")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert hub.is_private(repo)
    assert hub.files(repo) == {}  # main, as it was made
    files = hub.files(repo, "v1")
    assert files.keys() == FILES
    commits = hub.commits(repo, "v1")
    assert commits[1].message == "From here"
    lines = done.stdout.splitlines()
    assert lines[0] == f"Published 26 files to {hub.url}/{repo}/tree/{commits[1].sha}"
    assert lines[-1] == f'Pin this commit when loading: revision="{commits[1].sha}"'
    listed = dict(re.findall(r"^  (\S+) +([\d,]+) bytes$", done.stdout, re.MULTILINE))
    assert {name: int(size.replace(",", "")) for name, size in listed.items()} == {
        name: len(data) for name, data in files.items()
    }
    card = files["README.md"].decode()
    # What is given wins over the file, and the file over nothing.
    assert "# From the file" in card
    assert ("license: apache-2.0" in card, "- org/file" in card, "- fr" in card) == (True, True, True)
    assert "| learning\\_rate | 0.5 |" in card
    assert hub.token not in done.stdout + done.stderr + card


def test_a_dry_run_shows_each_file_and_the_card_and_asks_the_hub_nothing(
    hub: HubStandIn, client: HubClient, folder: Path
) -> None:
    number = len(hub.requests)
    code = """
import io
with contextlib.redirect_stdout(io.StringIO()) as printed:
    main(["--model", arguments["folder"], "--repo", "user/dry", "--dry-run", "--license", "apache-2.0"])
result = printed.getvalue()
"""
    head, card = client.run(code, folder=str(folder)).split("\n\nREADME.md:\n\n")
    assert len(hub.requests) == number
    assert "user/dry" not in hub.repositories
    assert head.splitlines()[0] == "user/dry would hold these 26 files, which load and score in a clean process:"
    assert {line.split()[0] for line in head.splitlines()[1:]} == FILES
    assert card.startswith("---\n")
    assert "# From the file" in card
    assert "## Licence" in card


def failure(client: HubClient, *arguments: str, setup: str = "") -> str:
    """What the command ends with, which must be its exit with one line."""
    with pytest.raises(ClientError) as raised:
        client.run(f"{setup}\nmain(arguments['argv'])", argv=list(arguments))
    assert "SystemExit" in raised.value.kinds
    message = str(raised.value)
    # `sys.exit` with a text writes it to stderr and exits with status 1.
    assert re.fullmatch(r"error: [^\n]{20,}", message), message
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "nowhere holds no saved model (no config.json); give the folder of save_pretrained"),
        (["--repo", "name"], "the repository must be given as user/name, got 'name'"),
        (["--card-data", "nowhere.json"], "nowhere.json"),
        (["--license-file", "nowhere.txt"], "the licence file nowhere.txt is not there"),
        (["--repo", "stranger/prm"], "(403): the token may not write there"),
    ],
)
def test_mistakes_are_one_line(client: HubClient, folder: Path, arguments: list[str], message: str) -> None:
    defaults = {"--model": str(folder), "--repo": "user/mistake"}
    options = defaults | dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert message in failure(client, *[word for option in options.items() for word in option])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "does not load: "),
        ("model.safetensors", b"cut off", "does not load: "),
        ("tokenizer.json", b"{}", "does not load: "),
        ("card_data.json", b'{"titel": "x"}', "not the data of a model card"),
        ("card_data.json", b'{"datasets": "org/name"}', "datasets must be a tuple of texts, got 'org/name'"),
    ],
)
def test_damaged_files_are_one_line(client: HubClient, folder: Path, file: str, content: bytes, message: str) -> None:
    (folder / file).write_bytes(content)
    assert message in failure(client, "--model", str(folder), "--repo", "user/damaged")


def test_a_hub_that_fails_is_one_line_without_the_token(hub: HubStandIn, client: HubClient, folder: Path) -> None:
    arguments = ("--model", str(folder), "--repo", "user/failing")
    hub.fail("commit", 500, path="/user/failing/")
    message = failure(client, *arguments)
    assert "the Hub refused user/failing (500): the repository is at its last good commit; publish again" in message
    # A server that gives back what it was sent.
    echo = """
def echo(*arguments, **options):
    raise RuntimeError(f"bad header: Bearer {os.environ['HF_TOKEN']}")

create_repo, huggingface_hub.HfApi.create_repo = huggingface_hub.HfApi.create_repo, echo
"""
    try:
        message = failure(client, *arguments, setup=echo)
    finally:
        client.run("huggingface_hub.HfApi.create_repo = create_repo")
    assert "bad header: Bearer [token]" in message
    assert hub.token not in message
    unreachable = "huggingface_hub.constants.ENDPOINT = 'http://127.0.0.1:9'"
    try:
        message = failure(client, *arguments, setup=unreachable)
    finally:
        client.run("huggingface_hub.constants.ENDPOINT = arguments['url']", url=hub.url)
    assert "the push to user/failing broke off; the repository is at its last good commit" in message


def test_the_exit_status_of_an_error_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(tmp_path), "--repo", "user/name"])
    # A text as status is written to stderr, and the process ends with 1.
    assert str(ended.value.code).startswith(f"error: {tmp_path} holds no saved model")
    assert capsys.readouterr().out == ""


def test_options_of_the_command_are_these(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    options = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert options == {
        *("--model", "--repo", "--private", "--revision", "--dry-run", "--force", "--commit-message", "--card-data"),
        *("--title", "--description", "--base-model", "--datasets", "--license", "--license-file", "--languages"),
    }
    with pytest.raises(SystemExit) as ended:
        main(["--model", "x", "--repo", "a/b", "--priv"])  # no abbreviations
    assert ended.value.code == 2
