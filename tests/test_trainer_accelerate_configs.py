"""The launch configurations: accelerate reads each, and the one for CPUs trains in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "trainer" / "accelerate_configs"
NAMES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def test_what_is_there() -> None:
    assert NAMES == ["cpu_2_processes.yaml", "ddp.yaml", "deepspeed_zero3.yaml", "fsdp2.yaml"]


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_it_and_it_says_whether_it_was_tried(name: str) -> None:
    # A key that accelerate does not know is an error there.
    config = load_config_from_file(str(FOLDER / name))
    raw = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    assert config.num_processes == raw["num_processes"] > 1
    assert str(config.distributed_type.value) == raw["distributed_type"]
    comment = " ".join(
        line for line in (FOLDER / name).read_text(encoding="utf-8").splitlines() if line.startswith("#")
    )
    assert ("Tried:" in comment) != ("Not tried here" in comment)


def test_sharded_engines_save_one_plain_checkpoint() -> None:
    fsdp = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    deepspeed = yaml.safe_load((FOLDER / "deepspeed_zero3.yaml").read_text(encoding="utf-8"))["deepspeed_config"]
    assert (fsdp["fsdp_version"], fsdp["fsdp_state_dict_type"]) == (2, "FULL_STATE_DICT")
    assert (deepspeed["zero_stage"], deepspeed["zero3_save_16bit_model"]) == (3, True)


def test_the_one_for_cpus_trains_in_two_processes(backbone_folder: object, tmp_path: Path) -> None:
    rows = [{"problem": f"{i} + 1?", "steps": [f"{i} + 1 = {i + 1}."], "labels": [1 - 2 * (i % 2)]} for i in range(8)]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["-m", "trainer.train", "--backbone", str(backbone_folder("llama")), "--train-data", "steps.jsonl"]
    command += ["--output-dir", "out", "--max-steps", "1", "--per-device-train-batch-size", "2", "--report-to", "none"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / NAMES[0]), *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    card = json.loads((tmp_path / "out" / "card_data.json").read_text(encoding="utf-8"))
    # Two records a process and two processes.
    assert card["training"]["batch_size"] == 4
