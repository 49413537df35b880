"""`RemoteVerifier` and servers that die, dawdle, talk nonsense, serve something else or ask for a key."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pooling_stand_in import Fault, PoolingStandIn
from scoring_by_hand import PROBLEM, SOLUTIONS

from modeling_prm import PRMForStepScoring, PRMProcessor, PRMVerifier
from modeling_prm.http_client import ServerError, ServerRefusal
from modeling_prm.remote_verifier import API_KEY_VARIABLE, RemoteVerifier

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
KEY = "sk-very-secret-0123456789"
NAN = float("nan")


def impatient(server: PoolingStandIn, processor: Any, **options: Any) -> RemoteVerifier:
    """A verifier that waits 0.01 s before the first retry."""
    verifier = RemoteVerifier(server.url, processor, **options)
    verifier._client.first_wait = 0.01
    return verifier


@pytest.fixture
def prm(make_prm: MakePRM) -> tuple[PRMForStepScoring, PRMProcessor]:
    return make_prm()


@pytest.fixture
def server(prm: Any) -> Iterator[PoolingStandIn]:
    with PoolingStandIn(*prm, slow_seconds=1.0) as stand_in:
        yield stand_in


@pytest.fixture
def expected(prm: Any) -> list[Any]:
    return [score.step_probs for score in PRMVerifier(*prm).score_solutions(PROBLEM, SOLUTIONS)]


def probs(scores: list[Any]) -> list[Any]:
    return [pytest.approx(score.step_probs, abs=1e-5) for score in scores]


@pytest.mark.parametrize(
    "fault",
    [
        *(500, 502, 503, 504, 408, 429, (429, {"Retry-After": "0"}), "cut", "half", "no JSON", "[]", "{}"),
        *('{"data": []}', '{"data": [{"data": "base64"}]}', '{"data": [{"data": [0.5]}]}'),
        '{"data": [{"data": [["0.5", "0.5"]]}]}',
    ],
    ids=str,
)
def test_what_may_pass_is_asked_again(fault: Fault, prm: Any, server: PoolingStandIn, expected: list[Any]) -> None:
    there = impatient(server, prm[1], concurrency=2)
    server.fault(fault)  # the probe
    there.score_solution(PROBLEM, SOLUTIONS[0])
    assert len(server.bodies) == 3
    server.fault(fault, fault, fault)
    scores = there.score_solutions(PROBLEM, SOLUTIONS)
    assert probs(scores) == expected
    assert server.faults == []
    assert len(server.bodies) == 3 + 5 + 3


def test_retry_after_is_waited_for(prm: Any, server: PoolingStandIn, expected: list[Any]) -> None:
    there = impatient(server, prm[1])
    there.score_solution(PROBLEM, SOLUTIONS[0])
    server.fault((429, {"Retry-After": "1"}))
    assert there.score_solution(PROBLEM, SOLUTIONS[0]).step_probs == pytest.approx(expected[0], abs=1e-5)
    assert server.times[-1] - server.times[-2] >= 1.0


def test_a_slow_server_is_given_up_and_asked_again(prm: Any, server: PoolingStandIn, expected: list[Any]) -> None:
    there = impatient(server, prm[1], timeout=0.3)
    there.score_solution(PROBLEM, SOLUTIONS[0])
    server.fault("slow")
    started = time.monotonic()
    assert there.score_solution(PROBLEM, SOLUTIONS[0]).step_probs == pytest.approx(expected[0], abs=1e-5)
    assert time.monotonic() - started < server.slow_seconds
    server.fault("slow", "slow")
    there = impatient(server, prm[1], timeout=0.3, retries=1)
    with pytest.raises(ServerError, match=r"/pooling failed 2 times, at last: ReadTimeout"):
        there.score_solution(PROBLEM, SOLUTIONS[0])


@pytest.mark.parametrize("on_error", ["raise", "record"])
def test_a_server_that_dies_in_the_middle(on_error: str, prm: Any, server: PoolingStandIn) -> None:
    there = impatient(server, prm[1], retries=2, concurrency=2)
    there.score_solution(PROBLEM, SOLUTIONS[0])
    asked = len(server.bodies)
    server.faults = [lambda rows: rows, "die"]
    threads = threading.active_count()
    with pytest.raises(ServerError, match=r"POST http://127\.0\.0\.1:\d+/pooling failed 3 times, at last: "):
        there.score_solutions(PROBLEM, SOLUTIONS * 4, on_error=on_error)
    # Of the twenty those under way are tried to the end, and no others are begun.
    assert len(server.bodies) - asked < 8
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_a_server_that_is_not_there(prm: Any, server: PoolingStandIn) -> None:
    there = impatient(server, prm[1], retries=1)
    server.stop()
    with pytest.raises(
        ServerError, match=r"GET http://127\.0\.0\.1:\d+/v1/models failed 2 times.* check that the server"
    ):
        there.score_solutions(PROBLEM, SOLUTIONS, on_error="record")


def test_it_goes_on_when_the_server_is_back(prm: Any, server: PoolingStandIn, expected: list[Any]) -> None:
    there = impatient(server, prm[1], retries=0)
    server.fault(503)
    with pytest.raises(ServerError):
        there.score_solution(PROBLEM, SOLUTIONS[0])
    assert there.score_solution(PROBLEM, SOLUTIONS[0]).step_probs == pytest.approx(expected[0], abs=1e-5)


@pytest.mark.parametrize("on_error", ["raise", "record"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"for solution \d, got \d rows for \d steps of \d+ tokens"),
        (lambda rows: [*rows, rows[0]], r"got \d rows for \d steps"),
        (lambda rows: [], "got 0 rows"),
        (lambda rows: [[2.5, -1.0]] * len(rows), r"a row of 2 starts with \[2\.5, -1\.0\], and \[p_wrong, p_right\]"),
        (lambda rows: [[0.4, 0.4]] * len(rows), "a row of 2 starts with"),
        (lambda rows: [[0.1, 0.2, 0.7]] * len(rows), "a row of 3 starts with"),
        (lambda rows: [[1.5]] * len(rows), "a row of 1 starts with"),
        (lambda rows: [[0.01] * 100] * len(rows), "a row of 100 starts with"),
    ],
    ids=["fewer", "more", "none", "logits", "no sum", "three", "above one", "an embedding"],
)
def test_rows_that_cannot_be_are_an_error_at_once(
    change: Callable[..., Any], message: str, on_error: str, prm: Any, server: PoolingStandIn
) -> None:
    there = impatient(server, prm[1], concurrency=1)
    there.score_solution(PROBLEM, SOLUTIONS[0])
    asked = len(server.bodies)
    server.fault(change)
    with pytest.raises(ServerError, match=message):
        there.score_solutions(PROBLEM, SOLUTIONS, on_error=on_error)
    # It does not pass, so it is not tried again; one more may be under way.
    assert len(server.bodies) - asked <= 2


@pytest.mark.parametrize(
    "fault",
    [404, 400, lambda rows: rows[:1], lambda rows: [[0.1] * 8] * len(rows), lambda rows: [[None, None]] * len(rows)],
    ids=["no pooling", "refused", "one row", "embeddings", "NaN"],
)
def test_a_server_of_something_else_is_noticed_at_the_probe(fault: Fault, prm: Any, server: PoolingStandIn) -> None:
    there = impatient(server, prm[1])
    server.fault(fault)
    with pytest.raises((ServerError, ServerRefusal), match=r"the probe|refused with HTTP 404"):
        there.score_solutions(PROBLEM, SOLUTIONS, on_error="record")
    assert len(server.bodies) == 1


@pytest.mark.parametrize("value", [None, NAN, float("inf")], ids=str)
def test_numbers_that_are_not_finite_concern_their_solution(
    value: Any, prm: Any, server: PoolingStandIn, expected: list[Any]
) -> None:
    there = impatient(server, prm[1], concurrency=1)
    there.score_solution(PROBLEM, SOLUTIONS[0])
    spoil = [lambda rows: rows, lambda rows: [*rows[:-1], [value, value]]]
    server.fault(*spoil)
    scores = there.score_solutions(PROBLEM, SOLUTIONS, on_error="record")
    assert scores[1].error is not None
    assert scores[1].error.startswith("the server gave NaN or infinite numbers for solution 1; look for such values")
    assert scores[1].step_probs is None
    assert probs([score for score in scores if score.error is None]) == expected[:1] + expected[2:]
    server.fault(*spoil)
    with pytest.raises(ValueError, match="NaN or infinite numbers for solution 1"):
        there.score_solutions(PROBLEM, SOLUTIONS)


def test_a_refusal_of_one_solution_concerns_it(prm: Any, server: PoolingStandIn, expected: list[Any]) -> None:
    there = impatient(server, prm[1], concurrency=1)
    there.score_solution(PROBLEM, SOLUTIONS[0])
    for status in (400, 413, 422):
        server.fault(status)
        scores = there.score_solutions(PROBLEM, SOLUTIONS, on_error="record")
        assert scores[0].error is not None
        assert scores[0].error.startswith("the server refuses solution 0: POST http://")
        assert probs(scores[1:]) == expected[1:]
        server.fault(status)
        with pytest.raises(ValueError, match="the server refuses solution 0"):
            there.score_solutions(PROBLEM, SOLUTIONS)
    for status in (401, 403, 404):
        server.fault(status)
        with pytest.raises(ServerRefusal, match=f"refused with HTTP {status}"):
            there.score_solutions(PROBLEM, SOLUTIONS, on_error="record")


def test_a_key_is_sent_and_never_shown(
    prm: Any, expected: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where the server repeats the request's headers."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    with PoolingStandIn(*prm, api_key=KEY) as server:
        without = impatient(server, prm[1])
        with pytest.raises(ServerRefusal, match="refused with HTTP 401"):
            without.score_solution(PROBLEM, SOLUTIONS[0])
        wrong = impatient(server, prm[1], api_key="sk-another")
        with pytest.raises(ServerRefusal, match="refused with HTTP 401"):
            wrong.score_solution(PROBLEM, SOLUTIONS[0])
        given = impatient(server, prm[1], api_key=KEY, retries=1)
        assert given.score_solution(PROBLEM, SOLUTIONS[0]).step_probs == pytest.approx(expected[0], abs=1e-5)
        monkeypatch.setenv(API_KEY_VARIABLE, KEY)
        from_environment = impatient(server, prm[1], retries=1)
        assert from_environment.score_solution(PROBLEM, SOLUTIONS[0]).step_probs is not None
        said = [repr(given), str(given), repr(vars(given)), repr(given._client)]
        for fault in (500, 403, 400):
            server.fault(fault, fault)
            with pytest.raises((ServerError, ValueError)) as caught:
                given.score_solution(PROBLEM, SOLUTIONS[0])
            server.faults.clear()
            assert "[key]" in str(caught.value)
            error: BaseException | None = caught.value
            while error is not None:
                said += [str(error), repr(error)]
                error = error.__cause__ or error.__context__
    assert "/pooling" in caplog.text
    for text in [*said, caplog.text, *(repr(record.args) for record in caplog.records)]:
        assert KEY not in text
