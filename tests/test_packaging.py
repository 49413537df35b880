"""The wheel and the source archive hold what they should, and the wheel works where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("modeling_prm", "trainer", "hub_card")

IMPORT_ALL = """
import json
import hub_card, modeling_prm, trainer
print(json.dumps({module.__name__: module.__file__ for module in (hub_card, modeling_prm, trainer)}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command, fail with what it said if it fails, and return its standard output."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The paths of the files under version control that are still there, relative to the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to know which files belong to the project")
    listed = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return [path for path in listed if path and (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def built(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that was built from it."""
    source = tmp_path_factory.mktemp("source")
    for path in tracked:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=source)
    return source / "dist"


def names_in_wheel(built: Path) -> set[str]:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_package_file_and_nothing_else(tracked: list[str], built: Path) -> None:
    names = names_in_wheel(built)
    of_the_packages = {path for path in tracked if path.split("/")[0] in PACKAGES}
    assert {f"{package}/py.typed" for package in PACKAGES} <= of_the_packages
    assert of_the_packages - names == set()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)


def test_source_archive_holds_what_a_build_needs(tracked: list[str], built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    of_the_packages = {path for path in tracked if path.split("/")[0] in PACKAGES}
    assert of_the_packages | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith("benchmarks/")]


def test_installed_wheel_imports_from_anywhere(built: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=tmp_path)

    # The dependencies come from the environment that runs this test. Python does not read .pth files of folders
    # that it found through one, so an editable install of the repository there stays out of the way.
    (site_packages,) = venv.glob("lib/python*/site-packages")
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(dependencies)))

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    files = json.loads(run(python, "-I", "-c", IMPORT_ALL, cwd=elsewhere).splitlines()[-1])
    assert files == {package: str(site_packages / package / "__init__.py") for package in PACKAGES}
