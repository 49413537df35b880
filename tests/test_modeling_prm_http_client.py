"""JSON over HTTP: what is tried again, what is not, in which order answers come, and that the key stays a secret."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from completions_stand_in import CompletionsStandIn

from modeling_prm.http_client import JsonClient, ServerError, ServerRefusal, key_from_environment

BODY = {"prompt": "?", "n": 1}


def write(body: dict[str, Any], index: int) -> str:
    return f"{body['prompt']} {index}"


def texts(answer: Any) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def client(server: CompletionsStandIn, **options: Any) -> JsonClient:
    return JsonClient(server.url, **{"timeout": 5.0, "retries": 2, "first_wait": 0.01, **options})


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "cut", "slow", "<html>", "few"])
def test_what_may_pass_is_asked_again(fault: int | str) -> None:
    def check(answer: Any) -> list[str]:
        (text,) = texts(answer)
        return [text]

    with CompletionsStandIn(write, slow_seconds=1.0) as server, client(server, timeout=0.4) as asking:
        server.fault(fault, fault)
        assert asking.post("/completions", BODY, check=check) == ["? 0"]
        assert len(server.bodies) == 3
        # And no longer than that.
        server.fault(fault, fault, fault)
        with pytest.raises(ServerError, match=r"POST http://127.0.0.1:\d+/v1/completions failed 3 times"):
            asking.post("/completions", BODY, check=check)
        assert len(server.bodies) == 6


@pytest.mark.parametrize("status", [400, 401, 404, 422, 307])
def test_what_is_refused_is_not_asked_again(status: int) -> None:
    with CompletionsStandIn(write) as server, client(server) as asking:
        server.fault(status)
        with pytest.raises(ServerRefusal, match=f"HTTP {status}") as caught:
            asking.post("/completions", BODY)
        assert caught.value.status == status
        assert len(server.bodies) == 1


def test_a_server_that_is_not_there_is_named() -> None:
    with CompletionsStandIn(write) as server:
        url = server.url
    with JsonClient(url, retries=1, first_wait=0.01) as asking, pytest.raises(ServerError, match="failed 2 times"):
        asking.get("/models")


def test_the_server_may_say_how_long_to_wait() -> None:
    with CompletionsStandIn(write) as server, client(server, first_wait=20.0) as asking:
        server.fault((429, {"Retry-After": "0.3"}), (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}))
        start = time.monotonic()
        assert texts(asking.post("/completions", BODY)) == ["? 0"]
        assert 0.3 <= time.monotonic() - start < 10.0


def test_waits_double() -> None:
    with CompletionsStandIn(write) as server, client(server, first_wait=0.1) as asking:
        server.fault(500, 500)
        start = time.monotonic()
        asking.post("/completions", BODY)
        # 0.1 and 0.2 seconds, each up to a quarter longer.
        assert time.monotonic() - start >= 0.3


def test_answers_keep_the_order_of_the_questions_and_few_are_under_way() -> None:
    with CompletionsStandIn(write, work_seconds=0.05) as server, client(server, concurrency=3) as asking:
        bodies = [{"prompt": str(number), "n": 1} for number in range(12)]
        server.fault(500, "cut")
        assert [texts(answer) for answer in asking.post_all("/completions", bodies)] == [[f"{n} 0"] for n in range(12)]
        assert server.most_under_way == 3
        server.fault(400)
        with pytest.raises(ServerRefusal):
            asking.post_all("/completions", bodies)


def test_threads_wait_for_their_turn_and_not_for_the_timeout() -> None:
    with CompletionsStandIn(write, work_seconds=0.3) as server:
        with client(server, concurrency=1, timeout=2.0, retries=0) as asking, ThreadPoolExecutor(10) as pool:
            # The last one waits 2.7 seconds.
            answers = list(pool.map(lambda _: texts(asking.post("/completions", BODY)), range(10)))
        assert answers == [["? 0"]] * 10
        assert server.most_under_way == 1


def test_the_key_is_sent_and_never_shown(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", " sk-secret-42\n")
    assert key_from_environment("NO_SUCH_KEY") is None
    key = key_from_environment("A_KEY")
    assert key == "sk-secret-42"
    with CompletionsStandIn(write, api_key=key) as server, client(server, api_key=key) as asking:
        assert texts(asking.post("/completions", BODY)) == ["? 0"]
        shown = [repr(asking)]
        with caplog.at_level(logging.DEBUG, logger="modeling_prm"):
            for faults, kind in (((500, 500, 500), ServerError), ((403,), ServerRefusal)):
                server.fault(*faults)
                with pytest.raises(kind) as caught:
                    asking.post("/completions", BODY)
                shown.append(str(caught.value))
        # The stand-in's errors repeat the header.
        assert all("Bearer [key]" in text for text in shown[1:])
        assert not any("secret" in text for text in [*shown, caplog.text])
        with client(server, api_key="other") as stranger, pytest.raises(ServerRefusal, match="401"):
            stranger.post("/completions", BODY)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("127.0.0.1:8000", {}, "must be like 'http://127.0.0.1:8000/v1'"),
        ("http://user:password@host/v1", {}, "holds a user or a password"),
        ("http://host/v1?key=1", {}, "must be like"),
        ("http://host", {"retries": -1}, "retries must be at least 0"),
        ("http://host", {"concurrency": 0}, "concurrency must be at least 1"),
        ("http://host", {"timeout": 0.0}, "timeout must be a number of seconds above 0"),
        ("http://host", {"api_key": "a\nb"}, "no HTTP header can carry"),
    ],
)
def test_options_that_cannot_be_are_refused(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        JsonClient(url, **options)
    assert "password@" not in str(caught.value)
