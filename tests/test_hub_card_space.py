"""A Space that is written has all it needs, runs the checkpoint's own code at one commit, and shows what it is told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from clean_process import run_clean
from hub_stand_in import HubStandIn

from hub_card import space
from hub_card.card import CardData, Picture, render_card
from hub_card.space import EXAMPLE, write_space
from modeling_prm import PRMForStepScoring, PRMProcessor

REPO, COMMIT = "user/tiny-prm", "0123456789abcdef0123456789abcdef01234567"
FILES = {"README.md", "app.py", "ranking.py", "requirements.txt", "space.json"}
Folder = Callable[..., Path]


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file()}


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The YAML header of the README, and the rest."""
    _, header, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), body


# ---- what is written ---------------------------------------------------------------------------------


def test_space_of_a_repository_names_it_and_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_this_machine")
    folder = write_space(tmp_path / "space", REPO, revision=COMMIT, title='Steps: "a" # b')
    files = files_of(folder)
    assert {path.name for path in folder.iterdir()} == FILES
    for name in ("app.py", "ranking.py"):
        compile(files[name], name, "exec")
    card, body = card_of(folder)
    assert card == {
        "title": 'Steps: "a" # b',
        "sdk": "gradio",
        "sdk_version": "6.31.0",
        "python_version": "3.11",
        "app_file": "app.py",
        "license": "apache-2.0",
        "models": ["user/tiny-prm"],
        "emoji": "🪜",
        "colorFrom": "green",
        "colorTo": "red",
        "short_description": "Scores the steps of solutions, and ranks these",
    }
    assert len(card["short_description"]) <= 60  # what the Hub takes
    assert f"commit `{COMMIT}`" in body
    assert json.loads(files["space.json"]) == {
        "title": 'Steps: "a" # b',
        "repo": "user/tiny-prm",
        "revision": COMMIT,
        "example": EXAMPLE,
    }
    for text in files.values():
        assert "hf_secret" not in text
        assert str(tmp_path) not in text
    assert not re.search(r"\$\w|\$\{\w|\{\{|TODO|None", body)


def test_space_of_a_folder_holds_its_model_and_no_path(prm_folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "my-prm"
    shutil.copytree(prm_folder("llama"), source)
    (source / "training_args.bin").write_bytes(b"holds a token")
    (source / "checkpoint-1").mkdir()
    # Training leaves these, with paths in them.
    picture = Picture(path=str(tmp_path / "curves.png"), caption="Curves")
    (source / "card_data.json").write_text(CardData(pictures=(picture,)).to_json())
    (source / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(tmp_path / "checkpoint-1")}))
    folder = write_space(tmp_path / "space", str(source))
    card, body = card_of(folder)
    assert card["title"] == "my-prm: step scores"
    assert "models" not in card
    assert "copied from a folder" in body
    settings = json.loads(files_of(folder)["space.json"])
    assert settings["repo"] is None
    assert settings["revision"] is None
    copied = {path.name for path in (folder / "model").iterdir()}
    assert copied == {path.name for path in prm_folder("llama").iterdir()}
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_example_comes_with_the_space(tmp_path: Path) -> None:
    example = {"problem": "1 + 1?", "solutions": ["Step 1: 2.", "Step 1: 3."], "step_style": "step_markers"}
    folder = write_space(tmp_path, REPO, revision=COMMIT, example=example)
    assert json.loads(files_of(folder)["space.json"])["example"] == example


def test_example_of_the_card_is_taken_where_its_author_gave_one(prm_folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "prm"
    shutil.copytree(prm_folder("llama"), source)
    for name, data, expected in [
        ("default", CardData(), EXAMPLE),
        ("theirs", CardData(example_problem="3?", example_steps=("1.", "3.")), theirs("3?", "1.\n\n3.")),
        # Joined to one text, these would be three steps.
        ("not to be cut", CardData(example_problem="3?", example_steps=("1.\n\n2.", "3.")), EXAMPLE),
    ]:
        (source / "card_data.json").write_text(data.to_json())
        folder = write_space(tmp_path / name, str(source))
        assert json.loads(files_of(folder)["space.json"])["example"] == expected
    given = theirs("4?", "4.")
    folder = write_space(tmp_path / "given", str(source), example=given)
    assert json.loads(files_of(folder)["space.json"])["example"] == given


def theirs(problem: str, *solutions: str) -> dict[str, Any]:
    return {"problem": problem, "solutions": list(solutions), "step_style": "blank_lines"}


def test_example_is_read_from_a_rendered_card(make_prm: Callable[..., Any]) -> None:
    model, processor = make_prm("llama")
    data = CardData(example_problem='A "b"\n```\nß?', example_steps=("x = `1`.", 'So "1".'))
    card = render_card(data, model, processor, repo_id=REPO, code={}, pictures={})
    assert space._example_in_card(card) == theirs('A "b"\n```\nß?', 'x = `1`.\n\nSo "1".')
    assert space._example_in_card(render_card(CardData(), model, processor, repo_id=REPO, code={}, pictures={})) is None
    for text in (
        "",
        'problem = "a"',
        'problem = "a"\nsteps = ["b" + "c"]',
        'problem = "a"\nsteps = ["b", 1, "c"]',
        'problem = ""\nsteps = ["a"]',
    ):
        assert space._example_in_card(text) is None


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("repo", ["", "name", "a/b/c", "../a/b", "user/na me", "user/a--b", "https://x/y", "u/n.git"])
def test_wrong_repository_ids_are_refused(repo: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"[Rr]epo"):
        write_space(tmp_path / "space", repo, revision=COMMIT)
    assert not (tmp_path / "space").exists()


def test_folder_that_holds_something_is_refused_and_overwritten_on_demand(prm_folder: Folder, tmp_path: Path) -> None:
    model = str(prm_folder("llama"))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("theirs")
    (tmp_path / "app.py").write_text("old")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_space(tmp_path, model)
    assert (tmp_path / "app.py").read_text() == "old"
    write_space(tmp_path, model, overwrite=True)
    assert (tmp_path / "app.py").read_text() != "old"
    assert (tmp_path / ".git" / "config").read_text() == "theirs"

    # The model of an earlier Space goes, wholly.
    (tmp_path / "model" / "model-00002-of-00002.safetensors").write_text("old")
    write_space(tmp_path, model, overwrite=True)
    assert not (tmp_path / "model" / "model-00002-of-00002.safetensors").exists()
    write_space(tmp_path, REPO, revision=COMMIT, overwrite=True)
    assert not (tmp_path / "model").exists()


def test_model_folder_of_others_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "theirs").write_text("theirs")
    with pytest.raises(FileExistsError, match="not of a Space written here"):
        write_space(tmp_path, REPO, revision=COMMIT, overwrite=True)
    assert (tmp_path / "model" / "theirs").exists()


def test_model_is_not_copied_onto_itself(prm_folder: Folder, tmp_path: Path) -> None:
    folder = write_space(tmp_path / "space", str(prm_folder("llama")))
    with pytest.raises(ValueError, match="choose another folder for the Space"):
        write_space(folder, str(folder / "model"), overwrite=True)
    assert (folder / "model" / "model.safetensors").exists()


def test_folder_without_the_verifiers_code_is_refused(prm_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(prm_folder("llama"), tmp_path / "old")
    (tmp_path / "old" / "scoring.py").unlink()
    with pytest.raises(ValueError, match=r"has no scoring\.py.*save them again"):
        write_space(tmp_path / "space", str(tmp_path / "old"))
    with pytest.raises(ValueError, match="no revision 'main'"):
        write_space(tmp_path / "space", str(prm_folder("llama")), revision="main")


@pytest.mark.parametrize("title", ["", "  ", "two\nlines"])
def test_titles_are_one_line(title: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one line"):
        write_space(tmp_path, REPO, revision=COMMIT, title=title)


@pytest.mark.parametrize(
    "example",
    [
        {"problem": "1?"},
        {"problem": "1?", "solutions": "1"},
        {"problem": "1?", "solutions": []},
        {"problem": "1?", "solutions": ["1"] * 9},
        {"problem": " ", "solutions": ["1"]},
        {"problem": "1?", "solutions": [1]},
        {"problem": "1?", "solutions": ["1"], "step_style": "thinking"},
        {"problem": "1?", "solutions": ["1"], "steps": []},
    ],
)
def test_examples_are_checked(example: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="example"):
        write_space(tmp_path, REPO, revision=COMMIT, example=example)


def test_branch_needs_the_hub(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full commit hash"):  # the tests are offline
        write_space(tmp_path / "space", REPO, revision="v1")
    assert not (tmp_path / "space").exists()


def test_command_writes_and_reports_mistakes_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "example.json").write_text('{"problem": "1?", "solutions": ["1."]}')
    options = ["--repo", REPO, "--revision", COMMIT, "--folder", str(tmp_path / "space")]
    space.main([*options, "--title", "T", "--example", str(tmp_path / "example.json")])
    assert f"hf upload USER/NAME {tmp_path / 'space'} . --type space" in capsys.readouterr().out
    settings = json.loads(files_of(tmp_path / "space")["space.json"])
    assert settings["title"] == "T"
    assert settings["example"] == {"problem": "1?", "solutions": ["1."], "step_style": "blank_lines"}
    with pytest.raises(SystemExit, match=r"^error: .*--overwrite"):
        space.main(options)
    space.main([*options, "--overwrite"])
    (tmp_path / "example.json").write_text("[1]")
    with pytest.raises(SystemExit, match=r"^error: .*example\.json must hold an object"):
        space.main([*options, "--overwrite", "--example", str(tmp_path / "example.json")])


# ---- at one commit ------------------------------------------------------------------------------------


WRITE = """
import json, sys
from huggingface_hub import HfApi
from hub_card.space import write_space

repo, model, folder = sys.argv[1:]
HfApi().create_repo(repo)
HfApi().upload_folder(repo_id=repo, folder_path=model)
card = b'problem = "3?"\\nsteps = ["1.", "3."]\\n'
HfApi().upload_file(repo_id=repo, path_or_fileobj=card, path_in_repo="README.md")
write_space(folder, repo, revision="main")
try:
    write_space(folder + "2", repo, revision="v9")
except OSError as error:
    print(json.dumps(str(error)))
"""
LOAD = """
import sys
sys.path.insert(0, arguments)
import app

verifier = app.load_verifier(app.read_settings())
score = verifier.score_solution("2 + 2?", ["2 + 2 = 4.", "So 4."])
result = {"step_probs": score["step_probs"], "module": type(verifier).__module__}
"""


def test_branch_becomes_the_commit_that_it_is_now(prm_folder: Folder, tmp_path: Path) -> None:
    with HubStandIn() as hub:
        error = hub.run(WRITE, tmp_path / "home", REPO, str(prm_folder("llama")), str(tmp_path / "space"))
        assert "cannot ask the Hub for user/tiny-prm at 'v9'" in error
        settings = json.loads(files_of(tmp_path / "space")["space.json"])
        assert settings["revision"] == hub.commits(REPO)[0].sha
        assert settings["example"] == theirs("3?", "1.\n\n3.")
        assert all(hub.token not in text and hub.url not in text for text in files_of(tmp_path / "space").values())


def test_later_code_of_the_repository_is_not_run(prm_folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs gradio: pip install modeling-prm[space]")
    with HubStandIn() as hub:
        hub.run(WRITE, tmp_path / "home", REPO, str(prm_folder("llama")), str(tmp_path / "space"))
        hub.commit(REPO, {"modeling_prm.py": b"raise RuntimeError('later code')", "config.json": b"{}"})
        environment = hub.environment(tmp_path / "hf_home")
        loaded = run_clean(LOAD, folder=tmp_path / "clean", arguments=str(tmp_path / "space"), environment=environment)
    model, processor = (kind.from_pretrained(prm_folder("llama")) for kind in (PRMForStepScoring, PRMProcessor))
    expected = model.verifier(processor).score_solution("2 + 2?", ["2 + 2 = 4.", "So 4."])
    assert loaded["step_probs"] == pytest.approx(expected.step_probs, abs=1e-6)
    assert loaded["module"].startswith("transformers_modules.")
