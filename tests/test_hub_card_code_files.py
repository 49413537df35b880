"""Whether a repository's code is told from a release's without running any of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clean_process import CODE_FILES, PROJECT
from hub_client import ClientError, shared_client

from hub_card import CodeCheck, code_files, verify
from hub_card.check_code import main
from hub_card.code_files import add_release, released_code, shipped_code

FIRST_RELEASE = PROJECT / "tests" / "fixtures" / "first_release"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.py")}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of releases of this test's own, without any."""
    path = tmp_path / "released_code.json"
    path.write_text("{}\n")
    monkeypatch.setattr(code_files, "_TABLE", path)
    return path


@pytest.fixture
def checkpoint(table: Path, prm_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A saved PRM of a release that is in the table."""
    add_release("1.2.3")
    return Path(shutil.copytree(prm_folder("llama"), tmp_path / "checkpoint"))


# ---- the table -------------------------------------------------------------------------------------


def test_the_table_holds_what_is_saved_with_a_checkpoint(checkpoint: Path, table: Path) -> None:
    assert shipped_code() == digests(checkpoint)
    assert shipped_code().keys() == CODE_FILES
    assert json.loads(table.read_text()) == {"1.2.3": digests(checkpoint)}
    assert table.read_text().endswith("}\n")


def test_a_release_in_the_table_never_changes(checkpoint: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = table.read_bytes()
    add_release("1.2.3")  # the same again
    assert table.read_bytes() == before
    monkeypatch.setattr(code_files, "shipped_code", lambda: {"modeling_prm.py": "0" * 64})
    with pytest.raises(ValueError, match=r"release 1.2.3 is in released_code.json with other code; a release never"):
        add_release("1.2.3")
    with pytest.raises(SystemExit, match=r"^error: release 1.2.3 is in"):
        main(["--add-release", "1.2.3"])
    assert table.read_bytes() == before
    main(["--add-release", "1.3.0"])
    assert list(released_code()) == ["1.3.0", "1.2.3"]
    assert released_code()["1.3.0"] == {"modeling_prm.py": "0" * 64}


def test_rows_of_the_package_are_those_of_its_releases() -> None:
    """A row is added when a release is made; what was saved with the first one is kept as a fixture."""
    rows = released_code()
    for version, row in rows.items():
        assert row, version
        assert all(name.endswith(".py") and len(digest) == 64 for name, digest in row.items()), version
    if "0.1.0" in rows:
        assert rows["0.1.0"] == digests(FIRST_RELEASE)
        assert verify(FIRST_RELEASE).ok


# ---- folders ---------------------------------------------------------------------------------------


def test_the_code_of_a_release_is_recognized(checkpoint: Path) -> None:
    check = verify(checkpoint)
    expected = CodeCheck(source=str(checkpoint), release="1.2.3", files=digests(checkpoint), problems=())
    assert check == expected
    assert check.ok
    assert str(check) == f"{checkpoint}: the code is that of modeling-prm 1.2.3"


def test_an_older_release_is_recognized_too(checkpoint: Path, table: Path) -> None:
    rows = json.loads(table.read_text())
    old = {**rows["1.2.3"], "step_loss.py": hashlib.sha256(b"old").hexdigest()}
    table.write_text(json.dumps({"1.0.0": old, **rows}))
    assert verify(checkpoint).release == "1.2.3"
    (checkpoint / "step_loss.py").write_bytes(b"old")
    assert verify(checkpoint).release == "1.0.0"
    (checkpoint / "scoring.py").write_bytes(b"new")
    assert verify(checkpoint).problems == ("scoring.py differs from modeling-prm 1.0.0",)


def test_the_first_release_is_recognized_by_its_files(table: Path) -> None:
    """Once its row is there: its configs name none of others, and what lies beside them is no pickle."""
    table.write_text(json.dumps({"0.1.0": digests(FIRST_RELEASE)}))
    assert verify(FIRST_RELEASE).ok


def plant(path: Path, mark: Path) -> None:
    """A file that leaves a mark where it is run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"open({str(mark)!r}, 'w').close()\n")


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("modeling_prm.py", "modeling_prm.py differs from modeling-prm 1.2.3"),
        ("extra.py", "extra.py is not a file of modeling-prm 1.2.3"),
        ("custom_generate/generate.py", "custom_generate/generate.py is not a file of modeling-prm 1.2.3"),
        ("sub/modeling_prm.py", "sub/modeling_prm.py is not a file of modeling-prm 1.2.3"),
        ("__init__.py", "__init__.py is not a file of modeling-prm 1.2.3"),
    ],
)
def test_other_code_is_named_and_not_run(checkpoint: Path, tmp_path: Path, file: str, problem: str) -> None:
    mark = tmp_path / "it ran"
    plant(checkpoint / file, mark)
    check = verify(checkpoint)
    assert (check.release, check.ok, check.problems) == (None, False, (problem,))
    assert str(check) == f"{checkpoint}: not the code of a release\n  {problem}"
    assert not mark.exists()
    exec((checkpoint / file).read_text(), {})  # it would be seen
    assert mark.exists()


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "step_loss.py").unlink()
    assert verify(checkpoint).problems == ("step_loss.py of modeling-prm 1.2.3 is missing",)


def test_one_changed_letter_is_seen(checkpoint: Path) -> None:
    code = (checkpoint / "aggregation.py").read_bytes()
    (checkpoint / "aggregation.py").write_bytes(code.replace(b"\n", b"\r\n", 1))
    assert verify(checkpoint).problems == ("aggregation.py differs from modeling-prm 1.2.3",)


FOREIGN = "someone/else--modeling_prm.PRMForStepScoring"


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.json", {"auto_map": {"AutoModel": FOREIGN}}, f"config.json loads {FOREIGN} from another repository"),
        (
            "config.json",
            {"text_config": {"sub": [{"auto_map": {"AutoConfig": FOREIGN}}]}},
            f"config.json loads {FOREIGN} from another repository",
        ),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["processing_prm.PRMProcessor", FOREIGN, None]}},
            f"tokenizer_config.json loads {FOREIGN} from another repository",
        ),
        ("processor_config.json", {"auto_map": FOREIGN}, f"processor_config.json loads {FOREIGN} from another repo"),
        ("preprocessor_config.json", {"auto_map": {"AutoProcessor": FOREIGN}}, "preprocessor_config.json loads "),
        (
            "config.json",
            {"custom_pipelines": {"step-scoring": {"impl": FOREIGN, "pt": ["AutoModel"]}}},
            f"config.json loads {FOREIGN} from another repository",
        ),
        # A config can name versions of itself, which are then read in its place.
        ("config.4.0.0.json", {"auto_map": {"AutoModel": FOREIGN}}, f"config.4.0.0.json loads {FOREIGN} from another"),
        ("config.json", {"auto_map": {"AutoModel": "ghost.Model"}}, "config.json names ghost.Model, whose file is not"),
        ("adapter_config.json", {"base_model_name_or_path": "a/b"}, "adapter_config.json makes loading take another"),
    ],
)
def test_code_of_other_repositories_is_named(
    checkpoint: Path, file: str, content: dict[str, Any], problem: str
) -> None:
    path = checkpoint / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | content))
    check = verify(checkpoint)
    assert check.release == "1.2.3"
    assert not check.ok
    assert len(check.problems) == 1
    assert check.problems[0].startswith(problem)
    assert str(check).startswith(f"{checkpoint}: the code is that of modeling-prm 1.2.3, but\n  ")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff", b'{"a":' * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900])
def test_a_config_that_cannot_be_read_is_named(checkpoint: Path, text: bytes) -> None:
    (checkpoint / "tokenizer_config.json").write_bytes(text)
    check = verify(checkpoint)
    assert not check.ok
    assert check.problems == ("tokenizer_config.json cannot be read as JSON, so what it loads cannot be told",)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "training_args.bin", "sub/x.pkl", "OPTIMIZER.PT", "a.pth", "a.pickle", "a.ckpt"]
)
def test_pickled_files_are_named_and_not_read(checkpoint: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "it ran"
    (checkpoint / name).parent.mkdir(exist_ok=True)
    # A pickle that opens a file when it is read.
    (checkpoint / name).write_bytes(b"cbuiltins\nopen\n(V" + str(mark).encode() + b"\nVw\ntR.")
    check = verify(checkpoint)
    assert check.problems == (f"{name} is a pickled file, which can run any code when it is read",)
    assert not check.ok
    assert not mark.exists()


def test_a_folder_without_code_and_a_package_without_releases(table: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    assert verify(tmp_path / "bare").problems == ("it holds no code",)
    (tmp_path / "bare" / "a.py").write_text("")
    assert verify(tmp_path / "bare").problems == ("no release is known",)


# ---- the command and the Hub -----------------------------------------------------------------------


def test_the_command_says_one_thing(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(checkpoint)])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{checkpoint}: the code is that of modeling-prm 1.2.3\n"
    (checkpoint / "extra.py").write_text("")
    with pytest.raises(SystemExit) as ended:
        main([str(checkpoint)])
    assert ended.value.code == 1
    assert "extra.py is not a file of modeling-prm 1.2.3" in capsys.readouterr().out
    for arguments in ([], [str(checkpoint), "--add-release", "1"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2


def test_a_repository_is_looked_at_in_one_commit() -> None:
    """Although another client pushes between the listing of the files and their reading."""
    hub, client = shared_client()
    client.run("result = publish(model(), processor, 'user/verified').commit")
    commit = hub.branches("user/verified")["main"]
    hub.commit_between("user/verified", {"modeling_prm.py": b"theirs", "new.py": b""}, before="file_info")
    code = """
import hub_card.code_files
table = {"9.9.9": hub_card.code_files.shipped_code()}
with replaced(hub_card.code_files, "released_code", lambda: table):
    result = dataclasses.asdict(verify(arguments["repo"], token=arguments.get("token")))
"""
    found = client.run(code, repo="user/verified")
    assert hub.unused_faults == []
    assert (found["source"], found["release"], found["problems"]) == (f"user/verified@{commit}", "9.9.9", [])
    found = client.run(code, repo="user/verified")
    assert found["release"] is None
    assert found["problems"] == [
        "modeling_prm.py differs from modeling-prm 9.9.9",
        "new.py is not a file of modeling-prm 9.9.9",
    ]


def test_repositories_that_cannot_be_read_are_one_line() -> None:
    hub, client = shared_client()
    client.run("publish(model(), processor, 'user/verified-private', private=True)")
    for token in (hub.stranger_token, "hf_wrong"):
        with pytest.raises(ClientError) as raised:
            client.run("verify('user/verified-private', token=arguments['token'])", token=token)
        assert "OSError" in raised.value.kinds
        assert token not in f"{raised.value} {raised.value.trace}"
    hub.cut_download(after=10, times=30, path="/user/verified-private/")
    with pytest.raises(ClientError, match=r"^error: cannot read user/verified-private from the Hub: ") as raised:
        client.run("import hub_card.check_code\nhub_card.check_code.main(['user/verified-private'])")
    assert "SystemExit" in raised.value.kinds
    while hub.unused_faults:  # how often the client tries again is its own affair
        hub.take_faults("download", "/user/verified-private/")
    lines = (
        "import hub_card.check_code",
        "with replaced(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9'):",
        "    hub_card.check_code.main(['user/name'])",
    )
    with pytest.raises(ClientError, match=r"^error: cannot read user/name from the Hub: ") as raised:
        client.run("\n".join(lines))
    assert "SystemExit" in raised.value.kinds
