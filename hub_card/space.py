"""Write a Gradio Space that scores the steps of solutions with a PRM, and ranks the solutions.

python -m hub_card.space --repo user/name --folder outputs/space

The Space needs nothing of this project: it loads the checkpoint with the code saved beside it, at one commit.
`--repo` may be a folder instead, for trying; its model is then copied into the Space.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import HfApi, SpaceCardData, hf_hub_download
from huggingface_hub.utils import validate_repo_id

from modeling_prm.step_splitting import split_steps

from .card import CARD_DATA_FILE, CardData
from .errors import one_line_errors, without_token

# Gradio and Python that the Space runs with; the floors for running it elsewhere are in its requirements.txt.
GRADIO_VERSION = "6.31.0"
PYTHON_VERSION = "3.11"
EXAMPLE: dict[str, Any] = {
    "problem": "Anna has 5 apples, buys 3 more, gives away 2 and finds 1 more. How many apples does Anna have now?",
    "solutions": [
        "5 + 3 = 8.\n\n8 - 2 = 7.\n\n7 + 1 = 8.\n\nThe answer is 8.",
        "5 + 3 = 8.\n\n8 - 2 = 6.\n\n6 + 1 = 7.\n\nThe answer is 7.",
    ],
    "step_style": "blank_lines",
}

_TEMPLATE = Path(__file__).with_name("space_template")
_COPIED = ("app.py", "ranking.py", "requirements.txt")
_MODEL_FOLDER = "model"
# What loading a checkpoint reads. What training leaves beside it stays behind: training arguments can hold a token,
# the data of the card and the trainer's state paths.
_MODEL_FILES = (
    *("*config.json", "config.*.json", "*.safetensors", "*.safetensors.index.json", "*.py", "*.jinja", "*.model"),
    *("tokenizer.json", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The most solutions that the page has boxes for, as in ranking.py.
_MAX_SOLUTIONS = 8
_STEP_STYLES = ("blank_lines", "newlines", "step_markers")


def write_space(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    title: str | None = None,
    example: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the files of a Space for one checkpoint.

    Args:
        folder: where to; made if it is not there.
        repo_id: the checkpoint, `user/name`, or a folder that exists: then its model is copied to the Space's
            `model/`, its README says so, and no path of this machine is written.
        revision: branch, tag or commit of the repository, its main branch by default. The Space loads the
            commit that this is now; the Hub is asked for it unless it is a full commit hash.
        title: of the page, one line.
        example: what visitors see first: `problem`, a text, `solutions`, one to eight texts, and, where these
            are not cut at blank lines, `step_style` (`"newlines"`, `"step_markers"`). By default the example
            that the author gave for the model's card (read from the card if the Hub is asked, from the
            folder's `card_data.json` otherwise), and where there is none, a sum of small numbers.
        overwrite: write into a folder that holds something. Files that are not the Space's stay.

    Returns:
        The folder.

    Raises:
        ValueError: no such id, a revision of a folder, a title, example or `card_data.json` that cannot be, or
            a checkpoint without the verifier.
        FileExistsError: the folder holds something, and `overwrite` is false.
        OSError: the Hub cannot be asked.
    """
    folder, source = Path(folder), Path(repo_id)
    # An empty path would be the working folder.
    if is_folder := bool(repo_id) and source.is_dir():
        if revision is not None:
            raise ValueError(f"{source} is a folder, which has no revision {revision!r}; leave revision out")
        _check_files(str(source), [path.name for path in source.iterdir()])
        name, repo, commit, of_card = source.resolve().name, None, None, _example_in_folder(source)
    else:
        _check_repo_id(repo_id)
        (commit, of_card), repo, name = _look_up(repo_id, revision), repo_id, repo_id.split("/")[1]
    settings = {
        "title": _checked_title(f"{name}: step scores" if title is None else title),
        "repo": repo,
        "revision": commit,
        "example": _checked_example(example) if example is not None else of_card or EXAMPLE,
    }
    _prepare(folder, source if is_folder else None, overwrite)
    for file in _COPIED:
        shutil.copyfile(_TEMPLATE / file, folder / file)
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "space.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(_readme(settings), encoding="utf-8")
    return folder


def _check_repo_id(repo_id: str) -> None:
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id must be 'user/name' or a folder that exists, got {repo_id!r}")


def _look_up(repo_id: str, revision: str | None) -> tuple[str, dict[str, Any] | None]:
    """The full hash of the commit that a revision is now, and the example in its card."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision, None
    try:
        info = HfApi().model_info(repo_id, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        card = hf_hub_download(repo_id, "README.md", revision=info.sha) if "README.md" in names else None
    except Exception as error:  # what a lost connection raises depends on huggingface_hub's version
        at = "" if revision is None else f" at {revision!r}"
        raise OSError(
            f"cannot ask the Hub for {repo_id}{at} ({without_token(str(error))}); check the name and the connection, "
            "or give the full commit hash as revision"
        ) from error
    _check_files(repo_id, names)
    if info.sha is None:
        raise OSError(f"the Hub names no commit of {repo_id}; give the full commit hash as revision")
    text = "" if card is None else Path(card).read_text(encoding="utf-8", errors="replace")
    return info.sha, _example_in_card(text)


def _example_in_card(text: str) -> dict[str, Any] | None:
    """The example of a card's quick start, None where there is none that its author gave."""
    problem = re.search(r'^problem = (".*")$', text, re.MULTILINE)
    steps = re.search(r'^steps = (\[".*"\])$', text, re.MULTILINE)
    if problem is None or steps is None:
        return None
    try:
        return _given_example(json.loads(problem[1]), json.loads(steps[1]))
    except (ValueError, TypeError):  # a card of somebody else's form
        return None


def _example_in_folder(folder: Path) -> dict[str, Any] | None:
    """The example in the data that training left for the card."""
    file = folder / CARD_DATA_FILE
    if not file.is_file():
        return None
    data = CardData.from_json(file.read_text(encoding="utf-8"))
    return _given_example(data.example_problem, data.example_steps)


def _given_example(problem: str, steps: Sequence[str]) -> dict[str, Any] | None:
    """A card's example as a Space's; None for the one that every card has by itself."""
    text = "\n\n".join(steps)
    is_default = problem == CardData.example_problem and tuple(steps) == CardData.example_steps
    if is_default or split_steps(text) != list(steps):
        return None
    return _checked_example({"problem": problem, "solutions": [text]})


def _check_files(source: str, names: Sequence[str]) -> None:
    if missing := {"config.json", "processor_config.json", "scoring.py"} - set(names):
        raise ValueError(
            f"{source} has no {', '.join(sorted(missing))}; a PRM saved with its processor and its code is needed: "
            "load both with this release and save them again"
        )


def _checked_title(title: str) -> str:
    if not title.strip() or not title.isprintable():
        raise ValueError(f"title must be one line of text, got {title!r}")
    return title.strip()


def _checked_example(example: Mapping[str, Any]) -> dict[str, Any]:
    problem, style = example.get("problem"), example.get("step_style", "blank_lines")
    solutions = example.get("solutions")
    solutions = list(solutions) if isinstance(solutions, (list, tuple)) else []
    if not 1 <= len(solutions) <= _MAX_SOLUTIONS or not all(_is_text(text) for text in (problem, *solutions)):
        raise ValueError(
            f"an example needs problem, a text, and solutions, a list of one to {_MAX_SOLUTIONS} texts, got {example!r}"
        )
    if style not in _STEP_STYLES or set(example) - {"problem", "solutions", "step_style"}:
        raise ValueError(
            f"an example may have, besides problem and solutions, step_style, one of {', '.join(_STEP_STYLES)}, and "
            f"nothing else; got {example!r}"
        )
    return {"problem": problem, "solutions": solutions, "step_style": style}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _prepare(folder: Path, model: Path | None, overwrite: bool) -> None:
    """Make the folder, without an earlier Space's model, and with a copy of this one if there is one."""
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} holds something; choose another folder, or overwrite (--overwrite)")
    target = folder / _MODEL_FOLDER
    if model is not None and model.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{model} lies where the Space's copy of it goes; choose another folder for the Space")
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if not (folder / "space.json").exists():
            raise FileExistsError(f"{target} is not of a Space written here, so it is not replaced; move it away")
        shutil.rmtree(target)
    if model is not None:
        target.mkdir()
        for path in sorted({path for pattern in _MODEL_FILES for path in model.glob(pattern)}):
            shutil.copyfile(path, target / path.name)


def _readme(settings: Mapping[str, Any]) -> str:
    repo, revision = settings["repo"], settings["revision"]
    data = SpaceCardData(
        title=settings["title"],
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version=PYTHON_VERSION,
        app_file="app.py",
        license="apache-2.0",
        models=None if repo is None else [repo],
        emoji="🪜",
        colorFrom="green",
        colorTo="red",
        short_description="Scores the steps of solutions, and ranks these",
    )
    if repo is None:
        model = "in the folder `model`"
        source = "The model was copied from a folder, for trying. Push it to a repository of its own and write this\n"
        source += "Space anew for that, so that visitors can see which model they use.\n"
    else:
        model = f"[{repo}](https://huggingface.co/{repo}/tree/{revision})"
        source = f"It loads commit `{revision}` of the model, and runs the code saved with it. A later\n"
        source += "version is used only when `space.json` names it.\n"
    body = Template((_TEMPLATE / "README.md").read_text(encoding="utf-8"))
    return f"---\n{data.to_yaml()}\n---\n\n{body.substitute(title=settings['title'], model=model, source=source)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Write a Space and say what to do with it."""
    parser = argparse.ArgumentParser(
        prog="python -m hub_card.space",
        description="Write a Gradio Space that scores the steps of solutions with a PRM, and ranks the solutions.",
    )
    parser.add_argument("--repo", required=True, help="the PRM, user/name; or a folder, whose model is copied")
    parser.add_argument("--folder", default="outputs/space", help="where to write (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit (default: what the main branch is now)")
    parser.add_argument("--title", help="of the page (default: the model's name)")
    parser.add_argument("--example", type=Path, help="JSON file: problem, solutions and, optionally, step_style")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds something")
    options = parser.parse_args(argv)
    with one_line_errors():
        folder = write_space(
            options.folder,
            options.repo,
            revision=options.revision,
            title=options.title,
            example=None if options.example is None else _read_example(options.example),
            overwrite=options.overwrite,
        )
    sys.stdout.write(
        f"Wrote a Space to {folder}.\n"
        f"Try it:     pip install -r {folder}/requirements.txt && python {folder}/app.py\n"
        f"Put it up:  hf repos create USER/NAME --type space --space-sdk gradio && "
        f"hf upload USER/NAME {folder} . --type space\n"
    )


def _read_example(path: Path) -> dict[str, Any]:
    try:
        example = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(example, dict):
        raise ValueError(f"{path} must hold an object with problem and solutions, got {type(example).__name__}")
    return example


if __name__ == "__main__":
    main()
