"""JSON over HTTP to a model's server: bounded concurrency, timeouts, retries, answers in the order of the questions.

    with JsonClient("http://127.0.0.1:8000", api_key=key_from_environment("OPENAI_API_KEY")) as client:
        client.get("/v1/models")
        client.post_all("/v1/completions", bodies, check=check_choices)

What may pass is tried again: a connection that is refused or cut, a timeout, 408, 429 and 5xx, an answer that is no
JSON or that `check` does not accept. What the server refuses (other 4xx) is raised at once. The API key stands in no
message, log or `repr`.
"""

from __future__ import annotations

import email.utils
import importlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, TracebackType
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

_MAY_PASS = frozenset({408, 429})
_LONGEST_WAIT_SECONDS = 30.0
_LONGEST_RETRY_AFTER_SECONDS = 300.0
_MOST_SHOWN = 300


class ServerError(ConnectionError):
    """A server that gives no usable answer, however often it is asked."""


class ServerRefusal(ValueError):
    """A request that the server says cannot be answered.

    Attributes:
        status: the HTTP status, from 300 to 499.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class JsonClient:
    """Asks one server, from any number of threads.

    Args:
        base_url: `http://` or `https://`, host, port, and the path before those that are asked for.
        api_key: sent as a bearer token; None sends none.
        timeout: seconds to connect, and between two parts of an answer, before an attempt counts as failed.
        retries: attempts after the first.
        concurrency: most requests under way at a time, from all threads together.
        first_wait: seconds before the first retry; each later one waits twice as long, up to 30 s, and up to a
            quarter longer by chance. A `Retry-After` of the server up to 5 minutes counts in their place.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument that cannot be, or a URL that holds a password.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        concurrency: int = 8,
        first_wait: float = 0.5,
    ) -> None:
        self.base_url = _checked_url(base_url)
        if not isinstance(api_key, str | None):
            raise TypeError(f"api_key must be a string or None, got {type(api_key).__name__}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
            raise ValueError(
                "api_key holds white space or a sign that no HTTP header can carry; check where it is from"
            )
        for name, value, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if type(value) is not int:
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, seconds in (("timeout", timeout), ("first_wait", first_wait)):
            if not 0 < seconds < float("inf"):
                raise ValueError(f"{name} must be a number of seconds above 0, got {seconds!r}")
        self.retries, self.concurrency, self.first_wait, self.timeout = retries, concurrency, first_wait, timeout
        self._secret = api_key or None
        self._free = threading.BoundedSemaphore(concurrency)
        self._chance = random.Random()
        self._httpx = _import_httpx()
        self._client = self._httpx.Client(
            headers={} if self._secret is None else {"Authorization": f"Bearer {self._secret}"},
            timeout=timeout,
            follow_redirects=False,  # which would take the key elsewhere
            limits=self._httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def __enter__(self) -> JsonClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the client cannot be used after it."""
        self._client.close()

    def get(self, path: str, *, check: Callable[[Any], Any] | None = None) -> Any:
        """The answer to a GET; see `post`."""
        return self._ask("GET", path, None, check)

    def post(self, path: str, body: Any, *, check: Callable[[Any], Any] | None = None) -> Any:
        """The answer to a POST of JSON.

        Args:
            path: what follows the base URL, from its slash on.
            body: whatever JSON can carry.
            check: takes the decoded answer and returns what this method returns; where it raises ValueError,
                TypeError, KeyError or IndexError the answer counts as nonsense, and the server is asked again.

        Raises:
            ServerError: no attempt gave a usable answer.
            ServerRefusal: the server refuses the request.
        """
        return self._ask("POST", path, body, check)

    def post_all(self, path: str, bodies: Sequence[Any], *, check: Callable[[Any], Any] | None = None) -> list[Any]:
        """The answers to several POSTs, at most `concurrency` of them under way, in the order of the bodies.

        Raises:
            ServerError, ServerRefusal: the first in this order that has no answer; those not begun yet are left.
        """
        if len(bodies) <= 1:
            return [self.post(path, body, check=check) for body in bodies]
        with ThreadPoolExecutor(min(self.concurrency, len(bodies)), thread_name_prefix="http") as pool:
            futures = [pool.submit(self.post, path, body, check=check) for body in bodies]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, method: str, path: str, body: Any, check: Callable[[Any], Any] | None) -> Any:
        content = None if body is None else json.dumps(body, allow_nan=False).encode("utf-8")
        fault = ""
        for attempt in range(self.retries + 1):
            answer, fault, wait = self._attempt(method, path, content, check)
            if not fault:
                return answer
            if attempt < self.retries:
                wait = self._wait(attempt) if wait is None else wait
                logger.info("%s %s%s: %s; asked again in %.1f s", method, self.base_url, path, fault, wait)
                time.sleep(wait)
        raise ServerError(
            f"{method} {self.base_url}{path} failed {self.retries + 1} times, at last: {fault}; check that the server "
            "runs and serves this, or give it more time or retries"
        )

    def _attempt(
        self, method: str, path: str, content: bytes | None, check: Callable[[Any], Any] | None
    ) -> tuple[Any, str, float | None]:
        """The answer; or what was wrong, "" where nothing was, and how long the server wants to be left alone."""
        headers = {"Content-Type": "application/json"} if content is not None else {}
        try:
            with self._free:
                response = self._client.request(method, self.base_url + path, content=content, headers=headers)
        except self._httpx.RequestError as error:
            return None, self._without_secret(f"{type(error).__name__} {error}".strip()), None
        status = response.status_code
        if status >= 500 or status in _MAY_PASS:
            return None, f"HTTP {status} {self._shown(response.text)}".strip(), _retry_after(response)
        if not 200 <= status < 300:
            raise ServerRefusal(
                f"{method} {self.base_url}{path} is refused with HTTP {status}: {self._shown(response.text)}", status
            )
        try:
            answer = json.loads(response.content)
        except (ValueError, RecursionError):
            return None, f"the answer is no JSON: {self._shown(response.text)!r}", None
        if check is None:
            return answer, "", None
        try:
            return check(answer), "", None
        except (ValueError, TypeError, KeyError, IndexError) as error:
            return None, self._without_secret(f"the answer is not as it must be: {error or type(error).__name__}"), None

    def _wait(self, attempt: int) -> float:
        wait = min(self.first_wait * 2.0**attempt, _LONGEST_WAIT_SECONDS)
        return wait * (1.0 + 0.25 * self._chance.random())

    def _shown(self, text: str) -> str:
        """The beginning of what a server wrote, on one line."""
        return self._without_secret(" ".join(text[: 4 * _MOST_SHOWN].split()))[:_MOST_SHOWN]

    def _without_secret(self, text: str) -> str:
        return text if self._secret is None else text.replace(self._secret, "[key]")


def key_from_environment(variable: str) -> str | None:
    """The API key that an environment variable holds, None where it is absent or empty."""
    return os.environ.get(variable, "").strip() or None


def _checked_url(base_url: str) -> str:
    if not isinstance(base_url, str):
        raise TypeError(f"the server's URL must be a string, got {type(base_url).__name__}")
    parts = urlsplit(base_url)
    if "@" in parts.netloc:
        raise ValueError("the server's URL holds a user or a password; leave it out, and give an API key in its place")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"the server's URL must be like 'http://127.0.0.1:8000/v1', got {base_url!r}")
    return base_url.rstrip("/")


def _retry_after(response: Any) -> float | None:
    """The seconds that a server asks to be left alone, at most 5 minutes; None where it does not say."""
    value = response.headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_SECONDS) if seconds == seconds else None


def _import_httpx() -> ModuleType:
    """The HTTP library that huggingface_hub brings: httpx2 since its version 2, httpx before."""
    for name in ("httpx2", "httpx"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("asking a server needs httpx2, which huggingface_hub brings: run `pip install httpx2`")
