"""`push_to_hub` of model and processor gives a repository that loads by its own code, from a Hub on localhost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clean_process import CODE_FILES, fingerprint, run_clean, run_with_package
from hub_stand_in import HubStandIn
from tiny_models import write_backbone
from transformers import AutoModel

from modeling_prm import PRMForStepScoring, PRMProcessor

REPO, COPY = "user/tiny-prm", "user/copy"
DATA_FILES = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}

PUSH = """
import torch
from modeling_prm import PRMForStepScoring, PRMProcessor

model = PRMForStepScoring.from_pretrained(arguments["folder"])
processor = PRMProcessor.from_pretrained(arguments["folder"])
result = {"first": fingerprint(model, processor)}
model.push_to_hub(arguments["repo"])
result["sha"] = processor.push_to_hub(arguments["repo"]).oid
with torch.no_grad():
    model.value_head.out.weight.mul_(-2.0)
result["second"] = fingerprint(model, processor)
model.push_to_hub(arguments["repo"])
processor.push_to_hub(arguments["repo"])
"""

LOAD = """
from transformers import AutoModel, AutoProcessor

def load(**revision):
    return [
        auto.from_pretrained(arguments["repo"], trust_remote_code=True, **revision)
        for auto in (AutoModel, AutoProcessor)
    ]

pair = load()
result = {
    "latest": fingerprint(*pair),
    "at the sha": fingerprint(*load(revision=arguments["sha"])),
    "modules": [type(part).__module__.split(".")[0] for part in (*pair, pair[0].config)],
}
for part in pair:
    part.push_to_hub(arguments["copy"])
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as server:
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint on this machine, and nothing of its backbone."""
    root = tmp_path_factory.mktemp("saved")
    model, processor = PRMForStepScoring.from_backbone(write_backbone("qwen2", root / "backbone"), head_type="mlp")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.value_head.parameters():
            parameter.normal_(0.0, 0.5)
    model.save_pretrained(root / "prm")
    processor.save_pretrained(root / "prm")
    shutil.rmtree(root / "backbone")
    return root / "prm"


@pytest.fixture(scope="module")
def pushed(hub: HubStandIn, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two pushes with different heads, from a process with the package; what it scored before each."""
    root = tmp_path_factory.mktemp("push")
    return run_with_package(
        PUSH,
        folder=root / "process",
        arguments={"folder": str(saved), "repo": REPO},
        environment=hub.environment(root / "hf_home"),
    )


@pytest.fixture(scope="module")
def loaded(hub: HubStandIn, pushed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a clean process gets from the Hub; it pushes that as a copy."""
    root = tmp_path_factory.mktemp("load")
    return run_clean(
        LOAD,
        folder=root / "process",
        arguments={"repo": REPO, "copy": COPY, "sha": pushed["sha"]},
        environment=hub.environment(root / "hf_home"),
    )


def test_scores_from_the_hub_are_bit_equal(saved: Path, pushed: dict[str, Any], loaded: dict[str, Any]) -> None:
    here = fingerprint(PRMForStepScoring.from_pretrained(saved), PRMProcessor.from_pretrained(saved))
    assert pushed["first"] == here
    assert len(set(here["logits"][:4])) == 4
    assert loaded["latest"] == pushed["second"]
    assert loaded["modules"] == ["transformers_modules"] * 3


def test_a_revision_gives_the_push_it_names(pushed: dict[str, Any], loaded: dict[str, Any]) -> None:
    assert loaded["at the sha"] == pushed["first"]
    assert pushed["first"]["logits"] != pushed["second"]["logits"]
    assert pushed["first"]["ids"] == pushed["second"]["ids"]


def test_exactly_the_expected_files_are_pushed(hub: HubStandIn, pushed: dict[str, Any]) -> None:
    files = hub.files(REPO)
    assert files.keys() == CODE_FILES | DATA_FILES | {"README.md"}
    package = Path(__file__).resolve().parent.parent / "modeling_prm"
    for name in CODE_FILES:
        assert files[name] == (package / name).read_bytes(), name


def test_no_pushed_file_names_a_local_folder(hub: HubStandIn, saved: Path, pushed: dict[str, Any]) -> None:
    local = [str(folder).encode() for folder in (saved.parents[1], Path(__file__).resolve().parents[1], Path.home())]
    for revision in ("main", pushed["sha"]):
        for name, data in hub.files(REPO, revision).items():
            assert not [folder for folder in local if folder in data], name


@pytest.mark.parametrize("repo", [REPO, COPY])
def test_a_repository_names_its_own_code(hub: HubStandIn, loaded: dict[str, Any], repo: str) -> None:
    """With a repository's name before the file's, a copy would run the code of the first repository."""
    files = hub.files(repo)
    auto_map = {name: json.loads(data).get("auto_map") for name, data in files.items() if name.endswith("config.json")}
    model = {"AutoConfig": "configuration_prm.PRMConfig", "AutoModel": "modeling_prm.PRMForStepScoring"}
    processor = {"AutoProcessor": "processing_prm.PRMProcessor"}
    assert auto_map == {"config.json": model, "processor_config.json": processor, "tokenizer_config.json": processor}


def test_a_copy_pushed_from_a_clean_process_is_whole(hub: HubStandIn, loaded: dict[str, Any]) -> None:
    first, copy = hub.files(REPO), hub.files(COPY)
    assert copy.keys() == first.keys()
    for name in [*CODE_FILES, "model.safetensors", "tokenizer.json", "processor_config.json"]:
        assert copy[name] == first[name], name
    assert not [name for name, data in copy.items() if REPO.encode() in data]


FROM_HUB = """
import torch
from huggingface_hub import upload_folder
from modeling_prm import PRMForStepScoring
from transformers import AutoModel

first = upload_folder(repo_id=arguments["repo"], folder_path=arguments["folder"]).oid
backbone = AutoModel.from_pretrained(arguments["folder"])
with torch.no_grad():
    backbone.get_input_embeddings().weight.mul_(2.0)
backbone.push_to_hub(arguments["repo"])

def row_sum(**revision):
    model, processor = PRMForStepScoring.from_backbone(arguments["repo"], **revision)
    assert processor("1 + 1?", ["2"])["step_positions"]
    return float(model.get_input_embeddings().weight[7].sum()), model.config.text_config.name_or_path

result = {"latest": row_sum(), "first": row_sum(revision=first)}
"""


def test_backbone_is_taken_from_the_hub_at_its_revision(hub: HubStandIn, tmp_path: Path) -> None:
    folder = write_backbone("qwen2", tmp_path / "backbone")
    hub_id = "user/tiny-backbone"
    found = run_with_package(
        "from huggingface_hub import create_repo\ncreate_repo(arguments['repo'])\n" + FROM_HUB,
        folder=tmp_path / "process",
        arguments={"repo": hub_id, "folder": str(folder)},
        environment=hub.environment(tmp_path / "hf_home"),
    )
    expected = float(AutoModel.from_pretrained(folder).get_input_embeddings().weight[7].detach().sum())
    assert found["first"] == [pytest.approx(expected), hub_id]
    assert found["latest"] == [pytest.approx(2 * expected), hub_id]
