"""A stand-in on 127.0.0.1 for a server that pools tokens as vLLM does, over a tiny model, with faults on order.

    with PoolingStandIn(model, processor) as server:
        server.fault("cut", "cut", 503)
        RemoteVerifier(server.url, processor).score_solution(problem, steps)
        assert server.faults == []

The probability of every token is computed here from the backbone's states and the linear head. Faults strike the next
requests to `/pooling`, one each, in their order; those of `RemoteVerifier`'s probe count as any other, so a test that
wants them later orders them after the first use. A fault is

    an HTTP status         answered with it, and a body that repeats the request's headers
    (status, headers)      the same with headers
    "cut"                  the connection is closed without an answer
    "half"                 it is closed in the middle of the answer
    "slow"                 the answer comes after `slow_seconds`
    "die"                  the server stops for good
    any other string       this text is the answer
    a function             the answer's rows, made of the right rows (a list of rows)
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR
from types import TracebackType
from typing import Any

import torch

Fault = int | tuple[int, dict[str, str]] | str | Callable[[list[list[float]]], list[Any]]


class PoolingStandIn:
    """See the module.

    Args:
        model, processor: a PRM with a linear head of one logit.
        rows: `"step"` answers a row for each id that is the separator, `"token"` a row for each id.
        labels: 2 for rows `[p_wrong, p_right]`, 1 for `[p_right]`.
        models: the names in `/v1/models`.
        max_model_len: the limit told there, None tells none.
        api_key: asked for, where it is not None.
        slow_seconds: how late a slow answer is.
        work_seconds: how long each answer takes, for requests to meet.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        rows: str = "step",
        labels: int = 2,
        models: tuple[str, ...] = ("prm",),
        max_model_len: int | None = 256,
        api_key: str | None = None,
        slow_seconds: float = 2.0,
        work_seconds: float = 0.0,
    ) -> None:
        self.model, self.processor, self.rows, self.labels = model, processor, rows, labels
        self.models, self.max_model_len, self.api_key = models, max_model_len, api_key
        self.slow_seconds, self.work_seconds = slow_seconds, work_seconds
        self.faults: list[Fault] = []
        self.bodies: list[dict[str, Any]] = []  # of the requests to /pooling
        self.paths: list[str] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = self.connections = 0
        self.is_dead = False
        self.lock = threading.Lock()

    def fault(self, *faults: Fault) -> None:
        self.faults += faults

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> PoolingStandIn:
        stand_in = self

        class Handler(_Handler):
            owner = stand_in

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server, as if its process had died: new connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def probabilities(self, input_ids: list[int]) -> list[float]:
        """P(correct) at every token."""
        with self.lock, torch.no_grad():
            hidden = self.model.backbone(input_ids=torch.tensor([input_ids])).last_hidden_state[0]
            head = self.model.value_head.out
            return torch.sigmoid(hidden @ head.weight[0] + head.bias[0]).tolist()

    def pooled(self, input_ids: list[int]) -> list[list[float]]:
        probs = self.probabilities(input_ids)
        if self.rows == "step":
            probs = [probs[i] for i, token in enumerate(input_ids) if token == self.processor.separator_token_id]
        return [[1.0 - prob, prob] if self.labels == 2 else [prob] for prob in probs]


class _Handler(BaseHTTPRequestHandler):
    owner: PoolingStandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.owner.lock:
            self.owner.connections += 1

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        owner = self.owner
        owner.paths.append(self.path)
        if self.path != "/v1/models" or not self._is_allowed():
            return self._send(404 if self.path != "/v1/models" else 401, {"error": "no"})
        models: list[dict[str, Any]] = [{"id": name, "object": "model"} for name in owner.models]
        for model in models:
            if owner.max_model_len is not None:
                model["max_model_len"] = owner.max_model_len
        return self._send(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            owner.paths.append(self.path)
            owner.bodies.append(body)
            owner.times.append(time.monotonic())
            owner.at_once += 1
            owner.most_at_once = max(owner.most_at_once, owner.at_once)
            fault = owner.faults.pop(0) if owner.faults else None
        try:
            self._answer(body, fault)
        finally:
            with owner.lock:
                owner.at_once -= 1

    def _answer(self, body: dict[str, Any], fault: Fault | None) -> None:
        owner = self.owner
        time.sleep(owner.work_seconds)
        if isinstance(fault, int | tuple):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            return self._send(status, {"error": f"as ordered, to {dict(self.headers)}"}, headers)
        if fault == "die" and not owner.is_dead:
            owner.is_dead = True
            threading.Thread(target=owner.stop, daemon=True).start()
        if fault == "cut" or owner.is_dead:
            return self._cut()
        if fault == "slow":
            time.sleep(owner.slow_seconds)
        if not self._is_allowed():
            return self._send(401, {"error": "Unauthorized"})
        if self.path != "/pooling":
            return self._send(404, {"error": "Not Found"})
        if body["model"] not in owner.models:
            return self._send(404, {"error": f"The model `{body['model']}` does not exist."})
        ids = body["input"]
        if owner.max_model_len is not None and len(ids) > owner.max_model_len:
            return self._send(400, {"error": f"maximum context length is {owner.max_model_len} tokens"})
        rows: list[Any] = owner.pooled(ids)
        if callable(fault):
            rows = fault(rows)
        answer = {"object": "list", "model": body["model"], "data": [{"index": 0, "object": "pooling", "data": rows}]}
        if fault == "half":
            self._send(200, answer, cut_after=0.5)
        elif isinstance(fault, str) and fault != "slow":
            self._send(200, fault)
        else:
            self._send(200, answer)

    def _is_allowed(self) -> bool:
        key = self.owner.api_key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def _send(
        self, status: int, answer: Any, headers: dict[str, str] | None = None, *, cut_after: float | None = None
    ) -> None:
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if cut_after is None else content[: int(len(content) * cut_after)])
            if cut_after is not None:
                self.wfile.flush()
                self._cut()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client did not wait

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(SHUT_RDWR)
