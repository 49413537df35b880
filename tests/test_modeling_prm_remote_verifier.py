"""`RemoteVerifier`: the same results as `PRMVerifier` has, and how it asks the server for them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pooling_stand_in import PoolingStandIn
from scoring_by_hand import PROBLEM, SOLUTIONS, by_hand
from test_modeling_prm_scoring_errors import BAD

from modeling_prm import PRMForStepScoring, PRMProcessor, PRMVerifier, SolutionScore
from modeling_prm.pooling_answers import RowsError, rows_of_steps
from modeling_prm.processing_prm import EncodedSolution
from modeling_prm.remote_verifier import PROBE_PROBLEM, PROBE_STEPS, RemoteVerifier, fingerprint

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]

PROBLEMS = [PROBLEM, "Ann has 3 apples.", PROBLEM, "3 * 4?", PROBLEM]


def same(score: SolutionScore, other: SolutionScore) -> bool:
    """Whether two results are equal, numbers to 1e-5."""
    ours, theirs = score.to_dict(), other.to_dict()
    for name in ("step_probs", "overall_score", "weakest_prob"):
        assert ours.pop(name) == pytest.approx(theirs.pop(name), abs=1e-5)
    return ours == theirs


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("rows", ["step", "token"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_results_are_those_of_a_verifier_here(family: str, rows: str, labels: int, make_prm: MakePRM) -> None:
    model, processor = make_prm(family)
    here = PRMVerifier(model, processor, "product", threshold=0.4)
    with (
        PoolingStandIn(model, processor, rows=rows, labels=labels) as server,
        RemoteVerifier(server.url, processor, "product", threshold=0.4) as there,
    ):
        scores = there.score_solutions(PROBLEMS, SOLUTIONS, first_idx=7)
        assert all(map(same, scores, here.score_solutions(PROBLEMS, SOLUTIONS, first_idx=7)))
        assert [score.solution_idx for score in scores] == [7, 8, 9, 10, 11]
        for problem, steps, score in zip(PROBLEMS, SOLUTIONS, scores, strict=True):
            assert score.step_probs == pytest.approx(by_hand(model, processor, problem, steps), abs=1e-5)
        ranked, expected = there.rank_solutions(PROBLEM, SOLUTIONS), here.rank_solutions(PROBLEM, SOLUTIONS)
        assert [score.solution_idx for score in ranked] == [score.solution_idx for score in expected]
        text = "12 + 30 = 42.\nSo the answer is 42."
        assert same(
            there.score_solution(PROBLEM, text, step_style="newlines"),
            here.score_solution(PROBLEM, text, step_style="newlines"),
        )
        # The ids alone are sent, one solution a request; the first is the probe.
        sent = processor.encode([PROBE_PROBLEM, *PROBLEMS], [PROBE_STEPS, *SOLUTIONS])
        ids = [body["input"] for body in server.bodies[:6]]
        assert ids[0] == sent[0].input_ids
        assert sorted(ids[1:]) == sorted(item.input_ids for item in sent[1:])
        assert {body["model"] for body in server.bodies} == {"prm"}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_scored_is_treated_alike(name: str, make_prm: MakePRM) -> None:
    problem, solution, kind, message = BAD[name]
    model, processor = make_prm()
    here = PRMVerifier(model, processor)
    problems, solutions = [PROBLEM, problem, PROBLEM], [SOLUTIONS[0], solution, SOLUTIONS[1]]
    with PoolingStandIn(model, processor) as server, RemoteVerifier(server.url, processor) as there:
        with pytest.raises(kind, match=message.format(i=1)):
            there.score_solutions(problems, solutions)
        scores = there.score_solutions(problems, solutions, on_error="record")
    for score, expected in zip(scores, here.score_solutions(problems, solutions, on_error="record"), strict=True):
        assert score.error == expected.error
        assert score.error is not None or same(score, expected)


def test_the_servers_own_limit_counts(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    long = ["12 + 30 = 42."] * 15
    (item,) = processor.encode([PROBLEM], [long])
    limit = len(item.input_ids) - 1
    with PoolingStandIn(model, processor, max_model_len=limit) as server:
        there = RemoteVerifier(server.url, processor)
        assert there.max_positions == limit
        message = f"solution 1 has {limit + 1} tokens, the server reads {limit}; score a shorter one"
        with pytest.raises(ValueError, match=message):
            there.score_solutions(PROBLEM, [long[:14], long])
        scores = there.score_solutions(PROBLEM, [long[:14], long], on_error="record")
        assert [score.error for score in scores] == [None, message]
    with PoolingStandIn(model, processor, max_model_len=None) as server:
        assert RemoteVerifier(server.url, processor).max_positions is None


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_a_time_than_asked_for(concurrency: int, make_prm: MakePRM) -> None:
    model, processor = make_prm()
    steps = [[f"12 + {i} = {12 + i}."] * (1 + i % 4) for i in range(12)]
    with PoolingStandIn(model, processor, work_seconds=0.03) as server:
        there = RemoteVerifier(server.url, processor, concurrency=concurrency)
        scores = there.score_solutions(PROBLEM, steps)
        assert server.most_at_once == concurrency
        # Connections stay open: no more than are used at a time.
        assert server.connections <= concurrency + 1
    assert [score.steps for score in scores] == [tuple(solution) for solution in steps]
    assert all(map(same, scores, PRMVerifier(model, processor).score_solutions(PROBLEM, steps)))


def test_results_keep_their_order_when_answers_do_not(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    with PoolingStandIn(model, processor, slow_seconds=0.3) as server:
        there = RemoteVerifier(server.url, processor)
        there.score_solution(PROBLEM, SOLUTIONS[2])
        server.fault("slow", "slow")  # whichever requests come first are answered last
        scores = there.score_solutions(PROBLEM, SOLUTIONS)
        assert server.faults == []
    assert all(map(same, scores, PRMVerifier(model, processor).score_solutions(PROBLEM, SOLUTIONS)))


def test_the_server_is_asked_for_its_models_once_and_only_when_there_is_something_to_score(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    with PoolingStandIn(model, processor) as server:
        there = RemoteVerifier(server.url + "/v1/", processor)  # as completions clients have it
        assert there.score_solutions([], []) == []
        assert there.score_solutions(PROBLEM, [[], [""]], on_error="record")[1].error is not None
        assert server.paths == []
        there.score_solution(PROBLEM, SOLUTIONS[0])
        there.score_solutions(PROBLEM, SOLUTIONS)
        assert server.paths == ["/v1/models", *["/pooling"] * 7]


def test_several_threads_may_use_one_at_once(make_prm: MakePRM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of them asks for the models, and the tokenizer, which may refuse it, is not asked by two at a time."""
    model, processor = make_prm()
    expected = PRMVerifier(model, processor).score_solutions(PROBLEM, SOLUTIONS)
    encode, inside, most = processor.encode, [], []

    def watched(*args: Any, **options: Any) -> Any:
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.02)
        try:
            return encode(*args, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(PRMProcessor, "encode", lambda self, *args, **options: watched(*args, **options))
    with PoolingStandIn(model, processor) as server, ThreadPoolExecutor(5) as pool:
        there = RemoteVerifier(server.url, processor)
        scores = list(pool.map(lambda steps: there.score_solution(PROBLEM, steps), SOLUTIONS))
        assert server.paths == ["/v1/models", *["/pooling"] * 6]
    assert len(most) == 6
    assert max(most) == 1
    for found, score in zip(scores, expected, strict=True):
        assert found.step_probs == pytest.approx(score.step_probs, abs=1e-5)


def test_conversations_are_tokenized_by_one_thread_at_a_time(
    make_prm: MakePRM, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_prm()
    encode, inside, most = processor.encode_conversations, [], []

    def watched(*args: Any, **options: Any) -> Any:
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.02)
        try:
            return encode(*args, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(PRMProcessor, "encode_conversations", lambda self, *args, **options: watched(*args, **options))
    talks = [[{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": f"{i}."}] for i in range(4)]
    with PoolingStandIn(model, processor) as server, ThreadPoolExecutor(4) as pool:
        there = RemoteVerifier(server.url, processor)
        scores = list(pool.map(there.score_messages, talks))
    assert most == [1, 1, 1, 1]
    for found, messages in zip(scores, talks, strict=True):
        expected = PRMVerifier(model, processor).score_messages(messages)
        assert found.step_probs == pytest.approx(expected.step_probs, abs=1e-5)


def test_a_model_is_found_or_named(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    with PoolingStandIn(model, processor, models=("a", "b")) as server:
        for name, message in ((None, "no model is named"), ("c", "there is no model 'c'")):
            there = RemoteVerifier(server.url, processor, model=name)
            with pytest.raises(ConnectionError, match=f"{message}, and {server.url} serves 'a', 'b'; give one of them"):
                there.score_solution(PROBLEM, SOLUTIONS[0])
        RemoteVerifier(server.url, processor, model="b").score_solution(PROBLEM, SOLUTIONS[0])
        assert [body["model"] for body in server.bodies] == ["b", "b"]


def test_a_fingerprint_tells_another_model(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    mark = fingerprint(PRMVerifier(model, processor))
    assert mark == pytest.approx(by_hand(model, processor, PROBE_PROBLEM, list(PROBE_STEPS)), abs=1e-5)
    with PoolingStandIn(model, processor) as server:
        RemoteVerifier(server.url, processor, fingerprint=mark).score_solution(PROBLEM, SOLUTIONS[0])
        other = tuple(1.0 - prob for prob in mark)
        there = RemoteVerifier(server.url, processor, fingerprint=other)
        with pytest.raises(ConnectionError, match=r"'prm' at http.* is another model: it gives the probe \(0\.\d+, "):
            there.score_solution(PROBLEM, SOLUTIONS[0])
        with pytest.raises(ConnectionError, match="is another model"):
            there.score_solutions(PROBLEM, SOLUTIONS, on_error="record")
        shifted = tuple(prob + 0.03 for prob in mark)
        RemoteVerifier(server.url, processor, fingerprint=shifted).score_solution(PROBLEM, SOLUTIONS[0])
        with pytest.raises(ConnectionError, match="is another model"):
            RemoteVerifier(server.url, processor, fingerprint=shifted, fingerprint_tolerance=0.02).score_solution(
                PROBLEM, SOLUTIONS[0]
            )


def test_a_checkpoint_names_aggregation_and_threshold(make_prm: MakePRM, tmp_path: Any) -> None:
    model, processor = make_prm(aggregation="last")
    model.config.error_threshold = 0.3
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # its weights are not needed
    with PoolingStandIn(model, processor) as server:
        there = RemoteVerifier.from_pretrained(server.url, str(tmp_path))
        assert same(
            there.score_solution(PROBLEM, SOLUTIONS[0]),
            PRMVerifier(model, processor).score_solution(PROBLEM, SOLUTIONS[0]),
        )
        assert (there.aggregation, there.threshold) == ("last", 0.3)
        given = RemoteVerifier.from_pretrained(server.url, str(tmp_path), "min", threshold=0.6)
        assert (given.aggregation, given.threshold) == ("min", 0.6)
    assert (RemoteVerifier("http://x", processor).aggregation, RemoteVerifier("http://x", processor).threshold) == (
        "min",
        0.5,
    )


def test_mistakes_in_making_one(make_prm: MakePRM) -> None:
    _, processor = make_prm()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"processor": processor.tokenizer}, TypeError, "the PRMProcessor of the served PRM is needed, got"),
        ({"url": "127.0.0.1:8000"}, ValueError, "the server's URL must be like"),
        ({"url": "http://me:secret@h"}, ValueError, "holds a user or a password"),
        ({"url": None}, TypeError, "must be a string"),
        ({"aggregation": "best"}, ValueError, "there is no aggregation 'best'"),
        ({"threshold": 1.5}, ValueError, "threshold must be in"),
        ({"model": 3}, TypeError, "model must be the name of a served model, got int"),
        ({"fingerprint": (0.5,)}, ValueError, "fingerprint must be the 3 numbers"),
        ({"concurrency": 0}, ValueError, "concurrency must be at least 1"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            RemoteVerifier(**{"url": "http://127.0.0.1:1", "processor": processor, **options})
        assert "secret" not in str(caught.value)


def test_rows_by_hand() -> None:
    """Ids of seven tokens with the separator 9 after the third and the last, and once within a step."""
    item = EncodedSolution([1, 5, 9, 6, 9, 7, 9], [2, 6], 2)
    tokens = [[float(i)] for i in range(7)]
    assert rows_of_steps(tokens, item, 9, 0) == [[2.0], [6.0]]
    assert rows_of_steps([[0.1], [0.2]], item, 9, 0) == [[0.1], [0.2]]
    assert rows_of_steps([[0.1], [0.2], [0.3]], item, 9, 0) == [[0.1], [0.3]]
    before = EncodedSolution(item.input_ids, [1, 5], 2)
    assert rows_of_steps(tokens, before, 9, -1) == [[1.0], [5.0]]
    for rows, separator, offset in (([[0.1]], 9, 0), ([[0.1]] * 6, 9, 0), ([[0.1]] * 3, 8, 0), ([[0.1]] * 3, 9, -1)):
        with pytest.raises(RowsError, match=rf"got {len(rows)} rows for 2 steps of 7 tokens.* step_tag_id {separator}"):
            rows_of_steps(rows, item, separator, offset)


def test_a_separator_that_is_ordinary_text(make_prm: MakePRM) -> None:
    """A server that looks for its id returns rows within steps too."""
    model, processor = make_prm("llama", separator_token="\n", step_joiner="")
    assert not processor.separator_is_reserved
    steps = ["12 + 30\n= 42.", "So the answer\nis 42."]
    (item,) = processor.encode([PROBLEM], [steps])
    assert item.input_ids.count(processor.separator_token_id) > 2
    for rows in ("step", "token"):
        with PoolingStandIn(model, processor, rows=rows) as server:
            score = RemoteVerifier(server.url, processor).score_solution(PROBLEM, steps)
        assert score.step_probs == pytest.approx(by_hand(model, processor, PROBLEM, steps), abs=1e-5)


def test_the_random_state_and_the_processor_are_left_alone(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    state, layout = torch.get_rng_state(), processor.to_dict()
    with PoolingStandIn(model, processor) as server:
        RemoteVerifier(server.url, processor).score_solutions(PROBLEM, SOLUTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert processor.to_dict() == layout


def test_its_repr_names_server_and_model(make_prm: MakePRM) -> None:
    _, processor = make_prm()
    shown = repr(RemoteVerifier("http://127.0.0.1:8000/", processor, model="m", api_key="the-key"))
    assert re.fullmatch(r"RemoteVerifier\('http://127\.0\.0\.1:8000', model='m'\)", shown)
