"""Whether the code in a repository is that of a release of this package, told without running it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_prm

from .errors import without_token

# Release: the SHA-256 of each of its code files.
_TABLE = Path(__file__).with_name("released_code.json")
# Reading these runs code of their author's choice.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# Files that loading reads references to code from; `configuration_files` of a config names versions of it.
_CONFIG = re.compile(r"[^/]*config(\.[^/]*)?\.json")


@dataclass(frozen=True, kw_only=True)
class CodeCheck:
    """What `verify` found.

    Args:
        source: the folder, or the repository at the commit that was looked at.
        release: the release of this package whose code it holds, None where it holds other code.
        files: the SHA-256 of each code file found.
        problems: what speaks against it, one sentence each.
    """

    source: str
    release: str | None
    files: dict[str, str]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether loading the checkpoint runs the code of a release, and no other."""
        return self.release is not None and not self.problems

    def __str__(self) -> str:
        if self.ok:
            return f"{self.source}: the code is that of modeling-prm {self.release}"
        code = f"the code is that of modeling-prm {self.release}, but" if self.release else "not the code of a release"
        return "\n".join([f"{self.source}: {code}", *(f"  {problem}" for problem in self.problems)])


def verify(
    source: str | os.PathLike[str], revision: str | None = None, *, token: str | bool | None = None
) -> CodeCheck:
    """Compare the code of a repository with every release of this package, without running any of it.

    Beside the code files it looks at what loading would run in their place: references of a config to the
    code of another repository, adapters, which name the model to load, and pickled files.

    Args:
        source: a Hub id, or a folder.
        revision: branch, tag or commit; what is found holds for the commit that this is now.
        token: for a private repository, as `huggingface_hub` takes it.

    Raises:
        OSError: the repository cannot be read.
    """
    label, names, read = _open(source, revision, token)
    code = {name: read(name) for name in names if name.endswith(".py")}
    files = {name: hashlib.sha256(text).hexdigest() for name, text in sorted(code.items())}
    table = released_code()
    release = next((version for version, known in table.items() if known == files), None)
    problems = [] if release else _differences(files, table)
    problems += [
        f"{name} is a pickled file, which can run any code when it is read"
        for name in names
        if name.lower().endswith(PICKLES)
    ]
    if "adapter_config.json" in names:
        problems.append("adapter_config.json makes loading take another model, with that one's code")
    for name in names:
        if _CONFIG.fullmatch(name):
            problems += _foreign_references(name, read(name), files)
    return CodeCheck(source=label, release=release, files=files, problems=tuple(problems))


def released_code() -> dict[str, dict[str, str]]:
    """The SHA-256 of each code file of each release, newest first."""
    table: dict[str, dict[str, str]] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return dict(reversed(table.items()))


def shipped_code() -> dict[str, str]:
    """The SHA-256 of each file that this version of the package saves with a checkpoint."""
    folder = Path(modeling_prm.__file__).parent
    paths = {str(folder / f"{name}_prm.py") for name in ("configuration", "modeling", "processing")}
    paths |= {found for path in list(paths) for found in get_relative_import_files(path)}
    return {Path(path).name: sha256(Path(path)) for path in sorted(paths)}


def add_release(version: str) -> None:
    """Add this package's code to the table of releases.

    Raises:
        ValueError: the table has this release, with other code.
    """
    table: dict[str, dict[str, str]] = json.loads(_TABLE.read_text(encoding="utf-8"))
    code = shipped_code()
    if table.get(version, code) != code:
        raise ValueError(
            f"release {version} is in {_TABLE.name} with other code; a release never changes: choose a new version"
        )
    table[version] = code
    _TABLE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _open(source: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> tuple[str, list[str], Any]:
    """What it is that is looked at, the names of its files, and a function that reads one of them."""
    folder = Path(source)
    if folder.is_dir():
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in paths]
        return str(source), names, lambda name: (folder / name).read_bytes()
    repo_id = str(source)
    with _reading(repo_id, token):
        info = HfApi().model_info(repo_id, revision=revision, token=token)
    names = sorted(sibling.rfilename for sibling in info.siblings or ())

    def read(name: str) -> bytes:
        with _reading(repo_id, token):
            return Path(hf_hub_download(repo_id, name, revision=info.sha, token=token)).read_bytes()

    return f"{repo_id}@{info.sha}", names, read


@contextmanager
def _reading(repo_id: str, token: str | bool | None) -> Iterator[None]:
    """Make an OSError of what a lost connection raises, which depends on huggingface_hub's version."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise OSError(f"cannot read {repo_id} from the Hub: {without_token(str(error), token)}") from None


def _differences(files: dict[str, str], table: dict[str, dict[str, str]]) -> list[str]:
    """What sets the files apart from the release that is nearest to them."""
    if not files:
        return ["it holds no code"]
    if not table:
        return ["no release is known"]
    nearest = max(table, key=lambda version: len(table[version].items() & files.items()))
    known = table[nearest]
    return [
        *(
            f"{name} differs from modeling-prm {nearest}"
            for name in sorted(files.keys() & known)
            if files[name] != known[name]
        ),
        *(f"{name} is not a file of modeling-prm {nearest}" for name in sorted(files.keys() - known)),
        *(f"{name} of modeling-prm {nearest} is missing" for name in sorted(known.keys() - files)),
    ]


def _foreign_references(name: str, text: bytes, files: dict[str, str]) -> list[str]:
    """The classes that a config names in a repository of others, or in a file that is not there."""
    try:
        references = _class_references(json.loads(text))
    except (ValueError, RecursionError):
        return [f"{name} cannot be read as JSON, so what it loads cannot be told"]
    found = []
    for reference in references:
        if "--" in reference:
            found.append(f"{name} loads {reference} from another repository")
        elif reference.partition(".")[0] + ".py" not in files:
            found.append(f"{name} names {reference}, whose file is not there")
    return found


def _class_references(config: Any) -> list[str]:
    """Every class that `auto_map` and `custom_pipelines` name, at any depth."""
    if isinstance(config, list):
        return [reference for item in config for reference in _class_references(item)]
    if not isinstance(config, dict):
        return []
    found = [text for key in ("auto_map", "custom_pipelines") for text in _strings(config.get(key)) if "." in text]
    rest = [value for key, value in config.items() if key not in ("auto_map", "custom_pipelines")]
    return found + _class_references(rest)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in values for text in _strings(item)]
