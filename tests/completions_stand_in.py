"""A stand-in on 127.0.0.1 for a server with the OpenAI completions interface, with faults on order.

    with CompletionsStandIn(lambda body, index: "So it is 5.") as server:
        server.fault("cut", 500, "slow")
        JsonClient(server.url).post("/completions", {"prompt": "2 + 3?", "n": 4})
        assert server.faults == []

`write(body, index)` gives the text of a request's choice of this index; a text with a trailing "…" is cut off by the
most tokens. Choices are answered last first, numbered. Faults strike the next requests for completions, one each:

    an HTTP status        answered with it and a body that repeats the request's headers; (status, headers) adds some
    "cut"                 the connection is closed without an answer
    "slow"                the answer comes after `slow_seconds`
    "few"                 a choice is missing
    any other string      this text is the answer
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

Fault = int | str | tuple[int, dict[str, str]]


class CompletionsStandIn:
    """See the module.

    Args:
        write: the text of a choice.
        models: the names in `/models`.
        api_key: asked for where it is not None.
        slow_seconds: how late a slow answer is.
        work_seconds: how long every answer takes.
        longest_prompt: prompts of more characters or ids are refused with 400.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any], int], str],
        *,
        models: tuple[str, ...] = ("policy",),
        api_key: str | None = None,
        slow_seconds: float = 2.0,
        work_seconds: float = 0.0,
        longest_prompt: int = 10**9,
    ) -> None:
        self.write, self.models, self.api_key, self.longest_prompt = write, models, api_key, longest_prompt
        self.slow_seconds, self.work_seconds = slow_seconds, work_seconds
        self.faults: list[Fault] = []
        self.bodies: list[dict[str, Any]] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def fault(self, *faults: Fault) -> None:
        with self.lock:
            self.faults += faults

    def __enter__(self) -> CompletionsStandIn:
        stand_in = self

        class Handler(_Handler):
            server_state = stand_in

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_state: CompletionsStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": name} for name in self.server_state.models]})

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state.lock:
            state.bodies.append(body)
            fault = state.faults.pop(0) if state.faults else None
            state.under_way += 1
            state.most_under_way = max(state.most_under_way, state.under_way)
        try:
            time.sleep(state.work_seconds)
            self._answer(body, fault)
        finally:
            with state.lock:
                state.under_way -= 1

    def _answer(self, body: dict[str, Any], fault: Fault | None) -> None:
        state = self.server_state
        if fault == "cut":
            self.connection.shutdown(SHUT_RDWR)
            self.close_connection = True
        elif isinstance(fault, (int, tuple)):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self._send(status, {"error": str(self.headers)}, headers)
        elif state.api_key is not None and self.headers.get("Authorization") != f"Bearer {state.api_key}":
            self._send(401, {"error": "wrong key"})
        elif body.get("model") not in (None, *state.models):
            self._send(404, {"error": "no such model"})
        elif len(body["prompt"]) > state.longest_prompt:
            self._send(400, {"error": f"the prompt is longer than {state.longest_prompt}"})
        elif isinstance(fault, str) and fault not in ("slow", "few"):
            self._send(200, fault)
        else:
            if fault == "slow":
                time.sleep(state.slow_seconds)
            texts = [state.write(body, index) for index in range(body["n"])]
            choices = [
                {
                    "index": index,
                    "text": text.removesuffix("…"),
                    "finish_reason": "length" if text[-1:] == "…" else "stop",
                }
                for index, text in enumerate(texts)
            ][::-1]
            tokens = sum(len(text.split()) for text in texts)
            self._send(200, {"choices": choices[fault == "few" :], "usage": {"completion_tokens": tokens}})

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client waited no longer
