"""A saved PRM loads by its own code, where nothing of ours is installed, and scores exactly as before."""

from __future__ import annotations

import ast
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from clean_process import CODE_FILES, PROBLEMS, PROJECT, SOLUTIONS, fingerprint, run_clean
from tiny_models import FAMILIES, write_backbone
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

from modeling_prm import PRMConfig, PRMForStepScoring, PRMProcessor
from trainer.arguments import PRMTrainingArguments
from trainer.prm_trainer import PRMTrainer

DATA_FILES = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}

CHAT_TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m.role }}\n{{ m.content }}\n{% endfor %}assistant:"
CLASSES = {"num_labels": 3, "class_weights": [1.0, 0.5, 0.0]}
# Name: the backbone's family and the options of `from_backbone`.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "mlp": ("qwen2", {"head_type": "mlp"}),
    "classes": ("llama", CLASSES),
    "mlp-classes": ("bert", {"head_type": "mlp", **CLASSES}),
    "own-templates": ("gpt2", {"separator_token": "<sep>", "step_template": "{i}) {step}", "step_joiner": " "}),
    "chat": ("qwen3", {"prompt_layout": "chat"}),
    "bfloat16": ("llama", {"dtype": torch.bfloat16}),
    "sharded": ("mistral", {}),
}

LOAD = """
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

def load(folder):
    return (
        AutoModel.from_pretrained(folder, trust_remote_code=True),
        AutoProcessor.from_pretrained(folder, trust_remote_code=True),
    )
"""
LOAD_ALL = (
    LOAD
    + """
refused = {}
for auto in (AutoConfig, AutoModel, AutoProcessor):
    for trust in ({}, {"trust_remote_code": False}):
        try:
            auto.from_pretrained(arguments["folders"]["qwen2"], **trust)
            refused[f"{auto.__name__} {trust}"] = "loaded"
        except ValueError as error:
            refused[f"{auto.__name__} {trust}"] = str(error)

seen_by_name, kept = {}, {}
for name, folder in arguments["folders"].items():
    model, processor = kept[name] = load(folder)
    seen_by_name[name] = {
        "mapped": fingerprint(model, processor, aligned=False),
        "loaded": fingerprint(model, processor),
        "again": fingerprint(*load(folder)),
        "modules": sorted({type(part).__module__.split(".")[0] for part in (model, processor, model.config)}),
        "config": AutoConfig.from_pretrained(folder, trust_remote_code=True).to_dict(),
        "tokenizer": AutoTokenizer.from_pretrained(folder)(arguments["text"])["input_ids"],
    }
    model.save_pretrained(f"{arguments['resaved']}/{name}")
    processor.save_pretrained(f"{arguments['resaved']}/{name}")
# Each again, now that all the others are loaded too.
for name, pair in kept.items():
    seen_by_name[name]["at the end"] = fingerprint(*pair)
result = {"seen": seen_by_name, "refused": refused}
"""
)
LOAD_RESAVED = LOAD + "result = {name: fingerprint(*load(folder)) for name, folder in arguments.items()}"


@dataclass(frozen=True)
class Saved:
    """One checkpoint where it lies now, and what its model gave before it was saved."""

    folder: Path
    before: dict[str, Any]
    config: dict[str, Any]
    tokenizer_ids: list[int]


def make_prm(name: str, root: Path) -> tuple[PRMForStepScoring, PRMProcessor]:
    """A PRM of a variant, with a head that tells steps apart."""
    family, options = VARIANTS[name]
    folder = write_backbone(family, root / name)
    if options.get("prompt_layout") == "chat":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    model, processor = PRMForStepScoring.from_backbone(folder, **options)
    with torch.no_grad():
        for parameter in model.value_head.parameters():
            parameter.normal_(0.0, 0.5)
    return model, processor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Every variant, saved, then moved elsewhere, with its backbone gone."""
    root = tmp_path_factory.mktemp("saved")
    checkpoints = {}
    for name in VARIANTS:
        model, processor = make_prm(name, root / "backbones")
        first = root / "first" / name
        model.save_pretrained(first, max_shard_size="20KB" if name == "sharded" else "1GB")
        processor.save_pretrained(first)
        folder = root / "moved" / name
        shutil.move(first, folder)
        ids = processor.tokenizer(PROBLEMS[0] + SOLUTIONS[0][1])["input_ids"]
        checkpoints[name] = Saved(folder, fingerprint(model, processor), model.config.to_dict(), ids)
    shutil.rmtree(root / "backbones")
    return checkpoints


@pytest.fixture(scope="module")
def loaded(saved: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a clean process sees of every variant; it saves each again below `resaved`."""
    root = tmp_path_factory.mktemp("loaded")
    arguments = {
        "folders": {name: str(checkpoint.folder) for name, checkpoint in saved.items()},
        "resaved": str(root / "resaved"),
        "text": PROBLEMS[0] + SOLUTIONS[0][1],
    }
    return {"root": root / "resaved"} | run_clean(LOAD_ALL, folder=root / "process", arguments=arguments)


@pytest.fixture(scope="module")
def resaved(loaded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What another clean process sees of the checkpoints that the first one saved."""
    folders = {name: str(loaded["root"] / name) for name in VARIANTS}
    return run_clean(LOAD_RESAVED, folder=tmp_path_factory.mktemp("resaved") / "process", arguments=folders)


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_in_a_clean_process_are_bit_equal(name: str, saved: dict[str, Saved], loaded: dict[str, Any]) -> None:
    seen, before = loaded["seen"][name], saved[name].before
    assert seen["loaded"] == before
    assert seen["again"] == before
    assert seen["at the end"] == before
    assert seen["modules"] == ["transformers_modules"]
    # As mapped from the file, without the copy that aligns weights in memory.
    mapped, exact = ([float.fromhex(value) for value in scores["logits"]] for scores in (seen["mapped"], before))
    torch.testing.assert_close(torch.tensor(mapped), torch.tensor(exact), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_tell_steps_apart(name: str, saved: dict[str, Saved]) -> None:
    """Equal scores would be equal after loading whatever was lost, rotary positions included."""
    before = saved[name].before
    classes = 3 if "classes" in name else 1
    assert before["shape"] == ([2, 3] if classes == 1 else [2, 3, 3])
    steps = [tuple(before["logits"][i : i + classes]) for i in range(0, 6 * classes, classes)]
    assert len(set(steps[:4])) == 4  # three steps of the first solution and one of the second
    assert before["dtypes"] == (["torch.bfloat16", "torch.float32"] if name == "bfloat16" else ["torch.float32"])


def test_rotary_frequencies_are_among_what_is_compared(saved: dict[str, Saved]) -> None:
    """They are not in the file, and loading must compute them again."""
    for name in ("qwen2", "qwen3", "llama", "mistral", "gemma3", "phi", "gpt_neox", "modernbert"):
        assert any("inv_freq" in buffer for buffer in saved[name].before["buffers"]), name


@pytest.mark.parametrize("name", VARIANTS)
def test_config_and_tokenizer_load_alone(name: str, saved: dict[str, Saved], loaded: dict[str, Any]) -> None:
    seen, expected = loaded["seen"][name], saved[name].config
    ours = PRMConfig(text_config=None).layout.keys() | {"model_type", "head_type", "aggregation", "class_weights"}
    assert {key: seen["config"][key] for key in ours} == {key: expected[key] for key in ours}
    assert seen["config"]["text_config"]["model_type"] == expected["text_config"]["model_type"]
    assert seen["tokenizer"] == saved[name].tokenizer_ids


@pytest.mark.parametrize("name", VARIANTS)
def test_saving_again_keeps_scores_and_code(
    name: str, saved: dict[str, Saved], loaded: dict[str, Any], resaved: dict[str, Any]
) -> None:
    assert resaved[name] == saved[name].before
    for file in CODE_FILES:
        assert (loaded["root"] / name / file).read_bytes() == (saved[name].folder / file).read_bytes()


def test_a_save_writes_exactly_the_expected_files(saved: dict[str, Saved], loaded: dict[str, Any]) -> None:
    for name, checkpoint in saved.items():
        expected = CODE_FILES | DATA_FILES | ({"chat_template.jinja"} if name == "chat" else set())
        if name == "sharded":
            shards = sorted(path.name for path in checkpoint.folder.glob("model-*.safetensors"))
            assert len(shards) > 2
            expected = expected - {"model.safetensors"} | {*shards, "model.safetensors.index.json"}
        assert {path.name for path in checkpoint.folder.iterdir()} == expected, name
        if name != "sharded":
            assert {path.name for path in (loaded["root"] / name).iterdir()} == expected, name


def test_no_file_names_a_local_folder(saved: dict[str, Saved], loaded: dict[str, Any]) -> None:
    for name, checkpoint in saved.items():
        root = str(checkpoint.folder.parent.parent.parent).encode()
        for path in [*checkpoint.folder.iterdir(), *(loaded["root"] / name).iterdir()]:
            assert root not in path.read_bytes(), path


def test_code_is_refused_without_trust(loaded: dict[str, Any]) -> None:
    assert len(loaded["refused"]) == 6
    for call, answer in loaded["refused"].items():
        assert "trust_remote_code=True" in answer, call


def test_with_the_package_no_trust_is_needed(saved: dict[str, Saved]) -> None:
    for name in ("qwen2", "mlp-classes", "sharded"):
        model = AutoModel.from_pretrained(saved[name].folder)
        processor = AutoProcessor.from_pretrained(saved[name].folder)
        assert (type(model), type(processor)) == (PRMForStepScoring, PRMProcessor)
        assert type(AutoConfig.from_pretrained(saved[name].folder)) is PRMConfig
        assert fingerprint(model, processor) == saved[name].before


def test_checkpoints_of_two_releases_load_in_one_process(saved: dict[str, Saved], tmp_path: Path) -> None:
    """Each by its own code, also where only a file that the model's file imports differs.

    The folders have different names: of two local folders of one name whose `configuration_prm.py` is the
    same, Transformers keeps using the model class that it loaded first.
    """
    folders = [saved["qwen2"].folder]
    for release, file in (("2", "modeling_prm.py"), ("3", "step_loss.py")):
        folders.append(tmp_path / f"release-{release}")
        shutil.copytree(folders[0], folders[-1])
        with (folders[-1] / file).open("a", encoding="utf-8") as code:
            code.write(f"\nRELEASE = {release}\n")
    code = """
import sys
result = []
for folder in arguments:
    model, processor = load(folder)
    package = type(model).__module__.rpartition(".")[0]
    modules = [sys.modules[f"{package}.{name}"] for name in ("modeling_prm", "step_loss")]
    result.append([[getattr(module, "RELEASE", 1) for module in modules], fingerprint(model, processor)])
"""
    releases = run_clean(LOAD + code, folder=tmp_path / "process", arguments=[str(folder) for folder in folders])
    assert [release for release, _ in releases] == [[1, 1], [2, 1], [1, 3]]
    assert all(scores == saved["qwen2"].before for _, scores in releases)


def test_trainer_checkpoints_load_in_a_clean_process(tmp_path: Path) -> None:
    model, processor = make_prm("qwen2", tmp_path / "backbone")
    rows = [
        {"problem": problem, "steps": steps, "labels": [1.0] * (len(steps) - 1) + [0.0]}
        for problem, steps in zip(PROBLEMS * 2, SOLUTIONS * 2, strict=True)
    ]
    options = {"use_cpu": True, "report_to": [], "max_steps": 2, "save_steps": 1, "learning_rate": 0.1, "seed": 1}
    arguments = PRMTrainingArguments(output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, **options)
    trainer = PRMTrainer(model, arguments, processing_class=processor, train_dataset=datasets.Dataset.from_list(rows))
    trainer.train()
    expected = fingerprint(model.eval(), processor)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    folders = {name: str(tmp_path / "moved" / f"checkpoint-{name}") for name in "12"}
    seen = run_clean(LOAD_RESAVED, folder=tmp_path / "process", arguments=folders)
    assert seen["2"] == expected
    assert seen["1"]["ids"] == expected["ids"]
    assert seen["1"]["logits"] != expected["logits"]


def test_a_clean_process_is_clean(tmp_path: Path) -> None:
    code = """
import os
result = {name: os.environ.get(name) for name in ("HF_HOME", "HF_HUB_OFFLINE", "PYTHONPATH")}
result["cwd"] = os.getcwd()
try:
    import modeling_prm
except ImportError as error:
    result["error"] = error.name
"""
    folder = tmp_path / "process"
    result = run_clean(code, folder=folder)
    home = {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": None}
    assert result == {**home, "cwd": str(folder.resolve()), "error": "modeling_prm"}
    with pytest.raises(RuntimeError, match="can be imported here, so this process is not a clean one"):
        run_clean("", folder=tmp_path / "other", hide=False)


# What code that runs on other people's machines may import: names to compute with. The system, the network, other
# processes and ways to run text as code are not among them; what reads files here is Transformers' `from_pretrained`.
ALLOWED_MODULES = {
    "__future__",
    "bisect",
    "collections",
    "collections.abc",
    "contextlib",
    "copy",
    "dataclasses",
    "difflib",
    "functools",
} | {"hashlib", "inspect", "itertools", "json", "math", "pathlib", "re", "torch", "torch.nn", "typing"}
# Of these, modules and functions are named; of `transformers` itself any class is.
ALLOWED_NAMES = {
    "torch": {"nn"},
    "torch.nn": {"functional"},
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING"},
    "transformers.models.auto.modeling_auto": {"MODEL_FOR_MASKED_LM_MAPPING", "MODEL_MAPPING"},
    "transformers.utils": {"ModelOutput", "can_return_tuple", "logging"},
}
REFUSED_NAMES = {"__builtins__", "__import__", "breakpoint", "compile", "eval", "exec", "globals", "input"} | (
    {"open", "print", "vars"}
)
REFUSED_ATTRIBUTES = (
    {"chmod", "environ", "getenv", "hub", "makedirs", "mkdir", "open", "popen", "read_bytes", "read_text", "rename"}
    | {"rmdir", "save", "spawn", "symlink_to", "system", "touch", "unlink", "write_bytes", "write_text"}
    # Where torch and Transformers load files, libraries and modules, or start processes and connections.
    | {"classes", "cpp_extension", "distributed", "dynamic_module_utils", "from_file", "load_library", "model_zoo"}
    | {"multiprocessing", "ops", "package", "cached_file", "import_module", "get_class_from_dynamic_module"}
    # Ways from any object to all others.
    | {"__builtins__", "__code__", "__globals__", "__import__", "__loader__", "__subclasses__"}
)


# A role in conversations too, so that the word alone is no reason.
SYSTEM_ROLE = "system"


def _is_system(names: list[ast.expr]) -> bool:
    return any(isinstance(name, ast.Constant) and name.value == SYSTEM_ROLE for name in names)


def complaints(source: str, siblings: set[str]) -> list[str]:
    """What the source of a shipped file does that it must not, one line each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names if alias.name not in ALLOWED_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [alias.name for alias in node.names]
            found += [f"from {node.module} import {name}" for name in names if not _may_import(node.module or "", name)]
        elif isinstance(node, ast.ImportFrom) and node.level > 0 and (node.level > 1 or node.module not in siblings):
            found.append(f"from {'.' * node.level}{node.module or ''}")
        elif isinstance(node, ast.Name) and node.id in REFUSED_NAMES:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and node.attr in REFUSED_ATTRIBUTES:
            found.append(f".{node.attr}")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append("torch.load")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and _is_system(node.args[1:2]):
            found.append("'system', which getattr takes")
        elif isinstance(node, ast.Constant) and node.value in REFUSED_ATTRIBUTES - {SYSTEM_ROLE}:
            found.append(f"{node.value!r}, which getattr takes")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Transformers finds the files to copy with a regular expression, which reads docstrings too.
            lines = [line.strip() for line in node.value.splitlines()]
            found += [line for line in lines if re.match(r"(from|import)\s+\.", line)]
    return found


def _may_import(module: str, name: str) -> bool:
    if module in ALLOWED_NAMES:
        return name in ALLOWED_NAMES[module]
    return name[0].isupper() if module == "transformers" else module in ALLOWED_MODULES


def test_shipped_code_only_computes(saved: dict[str, Saved]) -> None:
    folder = saved["qwen2"].folder
    shipped = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    assert shipped.keys() == CODE_FILES
    siblings = {name.removesuffix(".py") for name in shipped}
    assert {name: complaints(source, siblings) for name, source in shipped.items()} == {name: [] for name in shipped}
    for name, source in shipped.items():
        assert source == (PROJECT / "modeling_prm" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "source",
    [
        "import numpy",
        "def f():\n    from peft import PeftModel",
        "from modeling_prm.step_loss import step_loss",
        "from . import step_loss",
        "from .ghost import x",
        "from ..step_loss import x",
        "import os.path",
        "from urllib.request import urlopen",
        "__import__('os')",
        "open('x')",
        "eval('1')",
        "path.read_text()",
        "Path('x').open()",
        "torch.load('x')",
        "from torch import load",
        "torch.hub.load('x')",
        "transformers.utils.os.environ",
        "import logging",
        "import torch.utils.cpp_extension",
        "import json, sqlite3",
        "from concurrent.futures import ProcessPoolExecutor",
        "from transformers import utils",
        "from transformers.utils import cached_file",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
        "from torch import multiprocessing",
        "from torch import *",
        "torch.ops.load_library('x')",
        "torch.from_file('x')",
        "torch.distributed.init_process_group()",
        "getattr(module, 'environ')",
        "getattr(module, 'system')",
        "module.system('x')",
        "(lambda: 0).__globals__",
        "vars()['x']",
        'def f():\n    """Text.\n\n    from .ghost import x\n    """',
    ],
)
def test_the_check_of_shipped_code_sees(source: str) -> None:
    assert complaints(source, {"step_loss"})
    assert (
        complaints("from .step_loss import x\nimport re, torch.nn\nfrom transformers import AutoModel", {"step_loss"})
        == []
    )
