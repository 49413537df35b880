"""Load a saved PRM the way a stranger does: in a process of its own, without this project's packages.

score_in_clean_process("outputs/demo/model", ["1 + 1?"], [["1 + 1 = 2."]])
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import CheckpointError

# Runs under `python -I`: no working folder and no PYTHONPATH on the path. An installed copy of this
# project is refused by name, and the process checks that it is.
_SCRIPT = """
import importlib.abc, json, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"modeling_prm", "trainer", "hub_card"}:
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Hide())
for name in ("modeling_prm", "trainer", "hub_card"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} can be imported, so this process is not clean")

import torch
from transformers import AutoModel, AutoProcessor

request = json.load(sys.stdin)
torch.set_num_threads(request["threads"])
model = AutoModel.from_pretrained(request["source"], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(request["source"], trust_remote_code=True)
batch = processor(request["problems"], request["solutions"], return_tensors="pt")
with torch.inference_mode():
    output = model(**batch)
answer = {
    "input_ids": batch["input_ids"].tolist(),
    "logits": output.logits.tolist(),
    "step_probs": output.step_probs.tolist(),
    "model_module": type(model).__module__,
}
with open(request["answer"], "w") as file:
    json.dump(answer, file)
"""


@dataclass(frozen=True, kw_only=True)
class CleanScores:
    """What a clean process computed, padded as `PRMProcessor` and `PRMForStepScoring` pad.

    `input_ids` (B, L) int64, `logits` (B, S) or (B, S, K) float32, `step_probs` (B, S) float32, and the
    module that the model's class came from, which tells that it was the checkpoint's own code.
    """

    input_ids: torch.Tensor
    logits: torch.Tensor
    step_probs: torch.Tensor
    model_module: str


def score_in_clean_process(
    source: str | os.PathLike[str], problems: Sequence[str], solutions: Sequence[Sequence[str]]
) -> CleanScores:
    """Load a checkpoint with `trust_remote_code=True` and this project hidden, and score one batch.

    Args:
        source: a folder that a PRM and its processor were saved to. Its code is run.
        problems: B problems.
        solutions: B lists of steps.

    Raises:
        CheckpointError: the process failed; the message holds the end of what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        request = {
            "source": str(Path(source).resolve()),
            "problems": list(problems),
            "solutions": [list(steps) for steps in solutions],
            "threads": torch.get_num_threads(),
            "answer": str(answer),
        }
        done = subprocess.run(
            [sys.executable, "-I", "-c", _SCRIPT],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "HF_HOME": folder, "HF_MODULES_CACHE": f"{folder}/modules", "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        if done.returncode != 0:
            raise CheckpointError(
                f"the checkpoint {source} does not load and score in a clean process; it ended with:\n"
                + "\n".join(done.stderr.strip().splitlines()[-12:])
            )
        found = json.loads(answer.read_text())
    return CleanScores(
        input_ids=torch.tensor(found["input_ids"]),
        logits=torch.tensor(found["logits"]),
        step_probs=torch.tensor(found["step_probs"]),
        model_module=found["model_module"],
    )
