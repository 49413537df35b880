"""Runs Python in a process of its own, where this project is not installed and nothing is cached.

    result = run_clean("result = fingerprint(model, processor)", folder=tmp_path / "process")

A process that had imported `modeling_prm` would use its classes in place of the code saved beside a
checkpoint, so whether a checkpoint loads anywhere shows only in a process that cannot import it.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
OURS = ("trainer", "hub_card", "modeling_prm")
# What goes out with every checkpoint.
CODE_FILES = {
    *("aggregation.py", "backbones.py", "base_verifier.py", "batching.py", "capabilities.py", "configuration_prm.py"),
    *("conversation_ids.py", "conversation_layout.py", "conversation_scoring.py", "conversations.py"),
    *("joined_text.py", "modeling_prm.py", "pipeline_prm.py", "processing_prm.py", "scoring.py", "shared_prefix.py"),
    *("solution_score.py", "step_loss.py", "step_splitting.py"),
}

# What every process scores. Signs, special tokens as text, several scripts and line ends are where tokenizers
# differ; two solutions of different length make padding.
PROBLEMS = ["What is 2 + {x}, naïvely?\n", "Ann has 3 apples."]
SOLUTIONS = [["2 + 2 = 4.\n", "So <|step_end|> <s> [SEP] it is 四.", "\n\tf(12) := {y_1}² "], ["3 * 4 = 12."]]

# Hides the project, also where it is installed in editable mode, and checks that it is hidden.
_BOOTSTRAP = """
import importlib, json, pathlib, sys

def _start(folder):
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))

    class Hidden:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] in task["hidden"]:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.path[:0] = task["importable"]
    sys.meta_path.insert(0, Hidden)
    for name in task["must_be_missing"]:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        raise SystemExit(f"{name} can be imported here, so this process is not a clean one")
    return task

_folder = pathlib.Path(sys.argv[1])
_task = _start(_folder)
_names = {"__name__": "__main__", "arguments": _task["arguments"]}
exec(compile(_task["code"], "clean_process", "exec"), _names)
(_folder / "result.json").write_text(json.dumps(_names.get("result")), encoding="utf-8")
"""


def fingerprint(model: Any, processor: Any, aligned: bool = True) -> dict[str, Any]:
    """What must not change between saving and loading: ids, positions, logits and buffers, exactly.

    Args:
        aligned: copy the weights first. Weights that are mapped from a file start anywhere, those made in
            memory at multiples of 64 bytes, and some matrix products round differently then, by an ulp.
    """
    import hashlib

    import torch

    if aligned:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.clone()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inputs = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    torch.set_num_threads(threads)
    return {
        "ids": inputs["input_ids"].tolist(),
        "positions": inputs["step_positions"].tolist(),
        "shape": list(outputs.logits.shape),
        "logits": [value.hex() for value in outputs.logits.flatten().tolist()],
        "step_probs": [value.hex() for value in outputs.step_probs.flatten().tolist()],
        "buffers": {
            name: hashlib.sha256(buffer.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, buffer in model.named_buffers()
        },
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
    }


# The same function there and here, so that both sides are computed alike.
_PRELUDE = (
    f"from typing import Any\nPROBLEMS, SOLUTIONS = {PROBLEMS!r}, {SOLUTIONS!r}\n{inspect.getsource(fingerprint)}\n"
)


def run_clean(
    code: str, *, folder: Path, arguments: Any = None, environment: dict[str, str] | None = None, hide: bool = True
) -> Any:
    """Run `code` where none of this project's packages can be imported; return what it calls `result`.

    Args:
        code: may use `arguments`, `fingerprint`, `PROBLEMS` and `SOLUTIONS`, and sets `result`.
        folder: a new folder for this process: its working folder, its HF_HOME and its messages.
        arguments: anything that JSON can hold.
        environment: the variables of the process, in place of ours without any that touch Python or
            Transformers and with HF_HUB_OFFLINE.
        hide: False leaves the packages where an installation put them, which must then fail.

    Raises:
        RuntimeError: the process failed; the message is what it wrote.
    """
    task = {"hidden": OURS if hide else (), "must_be_missing": OURS, "importable": () if hide else (str(PROJECT),)}
    return _run(code, folder, arguments, environment, task)


def run_with_package(code: str, *, folder: Path, arguments: Any = None, environment: dict[str, str]) -> Any:
    """Run `code` as `run_clean` does, but where this project's packages can be imported."""
    return _run(
        code, folder, arguments, environment, {"hidden": (), "must_be_missing": (), "importable": (str(PROJECT),)}
    )


def clean_environment(home: Path) -> dict[str, str]:
    """Our variables without any that touch Python, Transformers or the Hub, and a cache at `home`."""
    removed = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
    return kept | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def _run(code: str, folder: Path, arguments: Any, environment: dict[str, str] | None, task: dict[str, Any]) -> Any:
    folder.mkdir(parents=True)
    text = json.dumps(task | {"code": _PRELUDE + code, "arguments": arguments})
    (folder / "task.json").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", "-c", _BOOTSTRAP, str(folder)],
        cwd=folder,
        env=environment or clean_environment(folder / "hf_home"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))
