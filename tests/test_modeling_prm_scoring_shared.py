"""Scoring that computes what solutions begin with once: the same scores on every backbone, and how it is planned."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scoring_by_hand import PROBLEM, by_hand, shapes_seen
from test_modeling_prm_capabilities import CONFIGS
from tiny_models import BIDIRECTIONAL, FAMILIES
from transformers import LlamaConfig, Qwen3NextConfig

from modeling_prm import PRMConfig, PRMForStepScoring, PRMProcessor, shared_prefix
from modeling_prm.batching import common_length, plan_chunks
from modeling_prm.capabilities import why_no_shared_prefix
from modeling_prm.processing_prm import EncodedSolution
from modeling_prm.shared_prefix import Piece, Segment, compute

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]

LONG_PROBLEM = "Ann has 3 apples. the quick brown fox jumps over the lazy dog, again. What is 12 + 30?"
FIRST = ["12 + 30 = 42.", "the quick brown fox jumps over the lazy dog."]
# In no order: solutions that share two steps, one that is the beginning of others, one twice, short and long.
SHARED_SOLUTIONS = [
    [*FIRST, "So the answer is 42."],
    ["It is 7."],
    FIRST,
    [*FIRST, "again and again.", "It is (42)."],
    ["Ann has 3 apples. 3 * 4 = 12. It is (12) {x} [y].", "the lazy dog"],
    ["It is 7."],
    [*FIRST, "again and again.", "jumps over", "the lazy dog"],
]


@pytest.mark.parametrize("max_tokens", [2048, 64, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_one_by_one(family: str, max_tokens: int, make_prm: MakePRM) -> None:
    model, processor = make_prm(family)
    problems = [LONG_PROBLEM] * 7 + [PROBLEM] * 7 + [LONG_PROBLEM + " And 4?"] * 7
    solutions = SHARED_SOLUTIONS * 3
    order = random.Random(0).sample(range(21), 21)
    scores = model.verifier(processor).score_solutions(
        [problems[i] for i in order], [solutions[i] for i in order], max_tokens_per_batch=max_tokens
    )
    assert [score.solution_idx for score in scores] == list(range(21))
    for i, score in zip(order, scores, strict=True):
        assert (score.problem, list(score.steps)) == (problems[i], solutions[i])
        assert score.step_probs == pytest.approx(by_hand(model, processor, problems[i], solutions[i]), abs=1e-5)
    assert (why_no_shared_prefix(model) is None) == (family not in BIDIRECTIONAL)


def prm_of(config: Any, attention: str) -> PRMForStepScoring:
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = PRMForStepScoring(PRMConfig(text_config=config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model


@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in BIDIRECTIONAL])
def test_every_family_of_the_table_goes_on_after_tokens_of_unequal_number(
    name: str, splits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sequences: 37 tokens; 20 of these and 25 others; 18 of these 25 too and 30 others."""
    generator = torch.Generator().manual_seed(3)
    a, b, c = (torch.randint(10, 300, (size,), generator=generator).tolist() for size in (37, 25, 30))
    model = prm_of(CONFIGS[name](), "eager")
    assert why_no_shared_prefix(model) is None
    split_layers = []
    attend = shared_prefix._SplitAttention._attend
    monkeypatch.setattr(
        shared_prefix._SplitAttention,
        "_attend",
        lambda self, layer, *inputs, **options: split_layers.append(layer) or attend(self, layer, *inputs, **options),
    )
    if not splits:
        monkeypatch.setattr(shared_prefix, "splits_attention", lambda model, device, length: False)
    for attention in ("eager", "sdpa"):
        if attention == "sdpa":
            try:
                model.set_attn_implementation("sdpa")
            except ValueError:
                break
        first = Segment(ids=a, keep=20, reads={5: 0, 36: 1})
        second = Segment(ids=b, before=(Piece(first, 20),), keep=18, reads={20: 0, 44: 1})
        third = Segment(ids=c, before=(Piece(first, 20), Piece(second, 38)), reads={38: 0, 67: 1})
        beside = Segment(ids=b[:9], before=(Piece(first, 7),), reads={15: 0})
        one = Segment(ids=b[:1], before=(Piece(first, 7),), reads={7: 0})
        for segments in ([first], [second], [beside, third], [one]):
            compute(model, segments, torch.device("cpu"))
        assert first.states is not None
        assert first.states[0][0].shape[1] == 20
        whole = [a, a[:20] + b, a[:20] + b[:18] + c, a[:7] + b[:9], a[:7] + b[:1]]
        for ids, segment in zip(whole, (first, second, third, beside, one), strict=True):
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([ids]), step_positions=torch.tensor([list(segment.reads)]))
            assert segment.probs == pytest.approx(alone.step_probs[0].tolist(), abs=1e-5)
    window = getattr(model.config.text_config, "sliding_window", None)
    has_sdpa = model.config.text_config._attn_implementation == "sdpa"
    # Falcon's layers keep the attention that they were made with.
    if splits and has_sdpa and name not in ("deepseek_v3", "falcon") and (window is None or window > 68):
        assert split_layers == [0, 1] * 3
    elif not splits:
        assert split_layers == []


def test_in_bfloat16_too(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama", dtype=torch.bfloat16)
    scores = model.verifier(processor).score_solutions(LONG_PROBLEM, SHARED_SOLUTIONS)
    for score, steps in zip(scores, SHARED_SOLUTIONS, strict=True):
        assert score.step_probs == pytest.approx(by_hand(model, processor, LONG_PROBLEM, steps), abs=3e-2)


def test_what_may_not_share_says_why() -> None:
    assert why_no_shared_prefix(prm_of(CONFIGS["bert"](), "sdpa")) == "its tokens see later ones"
    recurrent = Qwen3NextConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=64, num_experts=0
    )
    holder = type("Model", (), {"config": PRMConfig(text_config=recurrent)})()
    assert "recurrent" in str(why_no_shared_prefix(holder))
    for kind, says in (("dynamic", "change with the length"), ("linear", None)):
        rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
        holder.config = PRMConfig(text_config=LlamaConfig(rope_parameters=rope))
        reason = why_no_shared_prefix(holder)
        assert reason is None if says is None else says in str(reason)
    holder.config = PRMConfig(text_config=LlamaConfig())
    holder.config.text_config._attn_implementation_internal = "flash_attention_2"
    assert "flash_attention_2" in str(why_no_shared_prefix(holder))


def test_where_memory_runs_out_passes_get_smaller(make_prm: MakePRM, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = make_prm()
    forward, most = PRMForStepScoring.forward, [150]

    def with_little_memory(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.numel() > most[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(PRMForStepScoring, "forward", with_little_memory)
    problems = [f"{10 + i} + 30 = ?" for i in range(12)]
    solutions = [["It is 7."] * (1 + i % 4) for i in range(12)]
    scores: list[Any] = []
    verifier = model.verifier(processor)
    seen = shapes_seen(model, lambda: scores.extend(verifier.score_solutions(problems, solutions)))
    for score, problem, steps in zip(scores, problems, solutions, strict=True):
        assert score.step_probs == pytest.approx(by_hand(model, processor, problem, steps), abs=1e-5)
    # One pass that was too large, its half too, and none again after that.
    sizes = [rows * length for rows, length in seen]
    failed = [size for size in sizes if size > 150]
    assert 1 <= len(failed) <= 3
    assert sizes[: len(failed)] == failed == sorted(failed, reverse=True)
    most[0] = 10
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        verifier.score_solutions(problems, solutions)


def test_other_errors_are_not_taken_for_a_lack_of_memory(make_prm: MakePRM, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = make_prm()

    def broken(self: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(PRMForStepScoring, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        model.verifier(processor).score_solutions(PROBLEM, SHARED_SOLUTIONS)


def item(ids: list[int], *places: int) -> EncodedSolution:
    return EncodedSolution(ids, list(places), len(places))


def test_a_plan_by_hand() -> None:
    """Three sequences begin with 20 tokens, two of them with 20 more; a fourth shares 3, which is too few."""
    start, middle = list(range(100, 120)), list(range(200, 220))
    encoded = [
        item([*start, *middle, 1, 2], 19, 41),
        None,
        item([*start, 5, 6, 7], 19, 22),
        item([*start[:3], 9], 3),
        item([*start, *middle, 3], 19, 40),
    ]
    (chunk,) = plan_chunks(encoded, shares=True, most_kept=1000, most_tokens=1000)
    # By their ids: row 3 differs at its fourth token and comes first, then row 2, then rows 0 and 4.
    sizes = [[len(segment.ids) for segment in level] for level in chunk.levels]
    assert sizes == [[4, 23], [22], [1]]
    (alone, root), (branch,), (leaf,) = chunk.levels
    assert (alone.keep, root.keep, branch.keep, leaf.keep) == (0, 20, 20, 0)
    assert chunk.ready == {alone: [3], root: [2], branch: [0], leaf: [4]}
    assert (leaf.before, leaf.start) == ((Piece(root, 20), Piece(branch, 40)), 40)
    # The place 19, which three read, is read once.
    assert (root.reads, branch.reads, leaf.reads) == ({19: 0, 22: 1}, {41: 0}, {40: 0})
    (whole,) = plan_chunks(encoded, shares=False, most_kept=1, most_tokens=1)
    assert [sorted(len(segment.ids) for segment in level) for level in whole.levels] == [[4, 23, 41, 42]]


def test_chunks_end_between_problems() -> None:
    problems = [[number] * 40 for number in range(10)]
    encoded = [item([*problem, 50 + i], 40) for problem in problems for i in range(3)]
    chunks = list(plan_chunks(encoded, shares=True, most_kept=100, most_tokens=10**6))
    # Three problems of 40 tokens are more than 100; none is computed twice.
    assert [len(chunk.paths) for chunk in chunks] == [9, 9, 9, 3]
    assert sum(len(segment.ids) for chunk in chunks for level in chunk.levels for segment in level) == 10 * 43
    chunks = list(plan_chunks(encoded, shares=True, most_kept=10**6, most_tokens=50))
    assert [len(chunk.paths) for chunk in chunks] == [6] * 5


def test_the_length_in_common_against_counting() -> None:
    generator = random.Random(1)
    for _ in range(300):
        first, second = (generator.choices([1, 2], k=generator.randint(0, 9)) for _ in range(2))
        cut = generator.randint(0, len(first))
        second = first[:cut] + second
        counted = 0
        while counted < min(len(first), len(second)) and first[counted] == second[counted]:
            counted += 1
        assert common_length(first, second) == counted
