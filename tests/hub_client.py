"""A process that talks to the Hub stand-in with this project importable, for many conversations at one import's cost.

    hub, client = shared_client()
    client.run("result = publish(model(), processor, arguments['repo']).commit", repo="user/name")

What is run sees `publish`, `CardData` and so on (`SETUP`), the PRM saved in `client.prm`, and `arguments`; what it
calls `result` comes back. Names that it defines are there for the next run. Waiting between the retries of a request
takes no time, and the check in a clean process, which takes seconds, is left out unless `clean_check()` wraps the call.
"""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from hub_stand_in import HubStandIn
from tiny_models import write_backbone

from modeling_prm import PRMForStepScoring

PROJECT = Path(__file__).resolve().parent.parent
SETUP = """
import contextlib, dataclasses, logging, os, sys, time
sys.path[:0] = arguments["path"]
# Everything that our loggers say, to where the test can read it.
logging.basicConfig(level=logging.WARNING)
for name in ("hub_card", "trainer", "modeling_prm"):
    logging.getLogger(name).setLevel(logging.DEBUG)
import huggingface_hub, torch
import hub_card.publishing
from hub_card import CardData, EvaluationResult, publish, verify
from hub_card.__main__ import main
from modeling_prm import PRMForStepScoring, PRMProcessor
time.sleep = lambda seconds: None
torch.set_num_threads(1)
processor = PRMProcessor.from_pretrained(arguments["prm"])

def model(scale=1.0):
    "The PRM, with its head's weights multiplied."
    found = PRMForStepScoring.from_pretrained(arguments["prm"])
    with torch.no_grad():
        found.value_head.out.weight.mul_(scale)
    return found

@contextlib.contextmanager
def replaced(owner, name, value):
    "An attribute with another value for a while."
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)

_check = hub_card.publishing.check_clean_load
hub_card.publishing.check_clean_load = lambda *arguments: 0.0

def clean_check():
    return replaced(hub_card.publishing, "check_clean_load", _check)
"""
# Answers on a copy of its stdout, so that what is printed goes to the log.
_WORKER = """
import json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
names = {"__name__": "__main__"}
for line in sys.stdin:
    task = json.loads(line)
    names.pop("result", None)
    names["arguments"] = {**names.get("arguments", {}), **task["arguments"]}
    try:
        exec(compile(task["code"], "client", "exec"), names)
        answer = {"result": names.get("result")}
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        answer = {"error": str(error), "kinds": kinds, "traceback": traceback.format_exc()}
    sys.stdout.flush()
    print(json.dumps(answer), file=answers, flush=True)
"""


class ClientError(Exception):
    """What was run raised: `kinds` are the names of the error's classes, the message is its own."""

    def __init__(self, message: str, kinds: list[str], trace: str) -> None:
        super().__init__(message)
        self.kinds = kinds
        self.trace = trace


class HubClient:
    """The process; `prm` is the folder of a PRM, `log()` all that was printed and logged."""

    def __init__(self, hub: HubStandIn, folder: Path, prm: Path) -> None:
        self.prm = prm
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=hub.environment(folder / "hf_home"),
                cwd=folder,
            )
        self.run(SETUP, path=[str(PROJECT), str(PROJECT / "tests")], prm=str(prm))

    def run(self, code: str, **arguments: Any) -> Any:
        """Run code and return its `result`; `ClientError` if it raises."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"code": code, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client has ended:\n{self.log()[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"], answer["kinds"], answer["traceback"])
        return answer["result"]

    def log(self) -> str:
        """All that was printed and logged so far."""
        return self._log.read_text(encoding="utf-8")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@functools.cache
def shared_client() -> tuple[HubStandIn, HubClient]:
    """One Hub and one client for all tests of a session; each test takes repositories of its own."""
    temporary = tempfile.TemporaryDirectory(prefix="hub-client-")
    folder = Path(temporary.name)
    model, processor = PRMForStepScoring.from_backbone(write_backbone("qwen2", folder / "backbone"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.value_head.parameters():
            parameter.normal_(0.0, 0.5)
    model.save_pretrained(folder / "prm")
    processor.save_pretrained(folder / "prm")
    hub = HubStandIn().__enter__()
    client = HubClient(hub, folder, folder / "prm")

    @atexit.register
    def close() -> None:
        client.close()
        hub.__exit__()
        temporary.cleanup()

    return hub, client
