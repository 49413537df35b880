"""Packed rows: where each token and step stands, and loss, gradients, order and resuming as without.

Two processes with packed rows are tested beside those without, in `test_trainer_prm_trainer`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from small_training import (
    LABELS,
    exact_loss_and_gradients,
    make_arguments,
    make_rows,
    make_trainer,
    worst_difference,
)

from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.capabilities import Capabilities
from trainer.collator import PRMDataCollator
from trainer.losses import StepLoss
from trainer.packing import (
    Group,
    Packing,
    PackingCollator,
    ProblemSampler,
    choose_packing,
    logits_of_solutions,
    plan_rows,
    unpack,
)
from trainer.preparation import tokenize_dataset
from trainer.prm_trainer import PRMTrainer

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
Folder = Callable[..., Path]

EVERYTHING = Capabilities(packs=True, masks="one", has_cache=True)
PROBLEM = "Ann has 3 apples and Bob has 12; each gives half of them away. How many are left?"


def make_packing(**options: Any) -> Packing:
    """Where attention costs nothing beside the rest, so that the fewest tokens are the least work."""
    defaults = {"capabilities": EVERYTHING, "shares": False, "by_masks": False, "max_length": None}
    return Packing(**(defaults | {"hidden_size": 10**6} | options))


def lone(*lengths: int) -> list[Group]:
    return [Group((record,), (length,), (0,)) for record, length in enumerate(lengths)]


def planned(groups: list[Group], packing: Packing) -> list[list[tuple[tuple[int, ...], int]]]:
    return [[(tree.records, tree.size) for tree in row] for row in plan_rows(groups, packing)]


def solutions_of_problems() -> list[dict[str, Any]]:
    """The records of `small_training`; five have one problem, two another, and two of them a first step too."""
    rows = make_rows()
    for number in (0, 1, 3, 5, 7):
        rows[number]["problem"] = PROBLEM
    for number in (2, 6):
        rows[number]["problem"] = "What is 5 + 5?"
    rows[7]["steps"][0] = rows[5]["steps"][0]
    return rows


@pytest.fixture(scope="module")
def exact(prm_folder: Folder) -> Callable[[str], tuple[float, dict[str, torch.Tensor]]]:
    found: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}

    def of(family: str) -> tuple[float, dict[str, torch.Tensor]]:
        if family not in found:
            model = PRMForStepScoring.from_pretrained(prm_folder(family))
            processor = PRMProcessor.from_pretrained(prm_folder(family))
            found[family] = exact_loss_and_gradients(model, processor, short_rows())
        return found[family]

    return of


def short_rows(steps: int = 6) -> list[dict[str, Any]]:
    """So few steps that all fit with the tokenizers of all families."""
    rows = solutions_of_problems()
    return [{**row, "steps": row["steps"][:steps], "labels": row["labels"][:steps]} for row in rows]


@pytest.fixture
def attention_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """On models as narrow as those of the tests long rows do not pay, and little would be packed or shared."""
    monkeypatch.setattr(Packing, "cost", lambda self, rows, length: rows * length)


# --- The plan -----------------------------------------------------------------------------------------------------


def test_rows_are_filled_by_first_fit_decreasing() -> None:
    # 6 takes 4 beside it, 5 takes 5: two rows of 10 that are exactly full.
    assert planned(lone(5, 4, 6, 5), make_packing(max_length=10)) == [[((2,), 6), ((1,), 4)], [((0,), 5), ((3,), 5)]]
    # With one token less, three rows of 9 (6, 5 + 4 and 5) take 27 tokens, and four of 6 take 24.
    assert [len(row) for row in planned(lone(5, 4, 6, 5), make_packing(max_length=9))] == [1, 1, 1, 1]


def test_a_solution_longer_than_others_sets_the_row() -> None:
    rows = planned(lone(10, 10, 50, 10, 10, 10), make_packing(max_length=64))
    assert rows == [[((2,), 50)], [((number,), 10) for number in (0, 1, 3, 4, 5)]]


def test_rows_grow_no_longer_than_pays() -> None:
    # Four rows of 10 cost 40 (6 H + 10), two of 20 cost 40 (6 H + 20): long rows never pay where no padding is saved.
    assert [len(row) for row in plan_rows(lone(10, 10, 10, 10), make_packing(hidden_size=1))] == [1, 1, 1, 1]
    # 10 and 6 of 16 tokens: one row costs 16 (6 H + 16), two rows of 10 cost 20 (6 H + 10), equal at H = 7 / 3.
    assert len(plan_rows(lone(10, 6), make_packing(hidden_size=2))) == 2
    assert len(plan_rows(lone(10, 6), make_packing(hidden_size=3))) == 1


def test_flash_attention_takes_one_row_however_long() -> None:
    capabilities = Capabilities(packs=True, one_row=True)
    assert [len(row) for row in plan_rows(lone(9, 9, 9), make_packing(capabilities=capabilities, max_length=9))] == [3]


def test_solutions_share_their_problem_as_far_as_they_fit() -> None:
    # Four solutions of 10 with 6 in common: 10 + 3 * 4 = 22 tokens in one row. With 18 in a row, two times 10 + 4 are
    # 28 tokens, where 18 and 10 would be two rows of 18.
    group = [Group((3, 0, 2, 1), (10, 10, 10, 10), (0, 6, 6, 6))]
    assert planned(group, make_packing(shares=True)) == [[((3, 0, 2, 1), 22)]]
    assert planned(group, make_packing(shares=True, max_length=18)) == [[((2, 1), 14)], [((3, 0), 14)]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_length", [None, 60, 100])
@pytest.mark.parametrize("hidden_size", [1, 16, 4096])
def test_a_plan_is_never_more_work_than_padded_rows(seed: int, max_length: int | None, hidden_size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 61, (int(torch.randint(1, 20, (), generator=generator)),), generator=generator).tolist()
    packing = make_packing(max_length=max_length, hidden_size=hidden_size)
    rows = plan_rows(lone(*lengths), packing)
    assert sorted(record for row in rows for tree in row for record in tree.records) == list(range(len(lengths)))
    longest = max(sum(tree.size for tree in row) for row in rows)
    assert max_length is None or longest <= max_length
    assert len(rows) * longest * (6 * hidden_size + longest) <= len(lengths) * max(lengths) * (
        6 * hidden_size + max(lengths)
    )
    assert plan_rows(lone(*lengths), packing) == rows


# --- The batch ----------------------------------------------------------------------------------------------------

# Problem 7 is 50 51 52 and its first step 60 9; then one goes on with 61 9 and another with 62 63 9. 9 separates.
FEATURES: list[dict[str, Any]] = [
    {"input_ids": [50, 51, 52, 60, 9, 62, 63, 9], "step_positions": [4, 7], "labels": [1.0, 0.0], "problem_id": 7},
    {"input_ids": [40, 9], "step_positions": [1], "labels": [0.5, 1.0], "problem_id": 8},
    {"input_ids": [50, 51, 52, 60, 9, 61, 9], "step_positions": [4, 6], "labels": [1.0, -100.0], "problem_id": 7},
    {"input_ids": [41, 42, 43, 44, 45, 46, 9], "step_positions": [6], "labels": [0.0], "problem_id": 9},
]


@pytest.fixture
def processor(make_prm: MakePRM) -> PRMProcessor:
    return make_prm("llama")[1]


def test_packed_rows_hold_each_solution_by_itself(processor: PRMProcessor) -> None:
    pad = processor.pad_token_id
    batch = PackingCollator(processor, packing=make_packing(max_length=9))(FEATURES)
    assert batch.keys() == {"input_ids", "position_ids", "step_positions", "step_index", "labels"}
    # The first record of 8 ids; the third of 7 with the second of 2, a full row; the fourth.
    assert batch["input_ids"].tolist() == [
        [50, 51, 52, 60, 9, 62, 63, 9, pad],
        [50, 51, 52, 60, 9, 61, 9, 40, 9],
        [41, 42, 43, 44, 45, 46, 9, pad, pad],
    ]
    assert batch["position_ids"].tolist() == [[*range(8), 0], [*range(7), 0, 1], [*range(7), 0, 1]]
    assert batch["step_positions"].tolist() == [[4, 7, -1], [4, 6, 8], [6, -1, -1]]
    # Places in three rows of three steps.
    assert batch["step_index"].tolist() == [[0, 1], [5, -1], [3, 4], [6, -1]]
    assert batch["labels"].tolist() == [[1.0, 0.0], [0.5, -100.0], [1.0, -100.0], [0.0, -100.0]]


def test_where_nothing_shares_a_row_the_batch_is_the_padded_one(processor: PRMProcessor) -> None:
    # No two of them fit into a row of 9: 8 ids, and 7 with the mask that a padded row has.
    alone = [FEATURES[0], FEATURES[2]]
    batch = PackingCollator(processor, packing=make_packing(max_length=9))(alone)
    padded = PRMDataCollator(processor)(alone)
    assert batch.keys() == padded.keys() >= {"attention_mask"}
    assert all(batch[name].equal(padded[name]) for name in padded)
    assert batch["attention_mask"].sum(dim=1).tolist() == [8, 7]


def test_shared_rows_hold_common_tokens_once(processor: PRMProcessor) -> None:
    pad = processor.pad_token_id
    packing = make_packing(shares=True, by_masks=True, max_length=10)
    batch = PackingCollator(processor, packing=packing)(FEATURES)
    # Of problem 7 the third record comes first by its ids, then the first adds 62 63 9: a full row.
    assert batch["input_ids"].tolist() == [
        [50, 51, 52, 60, 9, 61, 9, 62, 63, 9],
        [41, 42, 43, 44, 45, 46, 9, 40, 9, pad],
    ]
    assert batch["position_ids"].tolist() == [[*range(7), 5, 6, 7], [*range(7), 0, 1, 0]]
    assert batch["step_positions"].tolist() == [[4, 6, 4, 9], [6, 8, -1, -1]]
    assert batch["step_index"].tolist() == [[2, 3], [5, -1], [0, 1], [4, -1]]
    # The common tokens are read to the row's end, 61 9 until 62 begins; padding by itself.
    assert batch["readers_end"].tolist() == [[10] * 5 + [7] * 2 + [10] * 3, [7] * 7 + [9] * 2 + [10]]
    assert batch["labels"].tolist() == [[1.0, 0.0], [0.5, -100.0], [1.0, -100.0], [0.0, -100.0]]
    # Without a problem's number nothing is shared.
    nameless = [{name: value for name, value in row.items() if name != "problem_id"} for row in FEATURES]
    assert PackingCollator(processor, packing=packing)(nameless)["input_ids"].shape == (3, 9)


def test_masks_say_who_sees_whom(processor: PRMProcessor) -> None:
    for form, window in (("one", None), ("one", 3), ("per_layer_type", 3)):
        can = Capabilities(packs=True, masks=form, window=window)
        packing = make_packing(capabilities=can, shares=True, by_masks=True, max_length=10)
        batch = PackingCollator(processor, packing=packing)(FEATURES)
        _, inputs = unpack(None, batch, packing, torch.float32)
        assert inputs.keys() == {"input_ids", "position_ids", "step_positions", "labels", "attention_mask"}
        masks = inputs["attention_mask"]
        # The sequences of each row, by places in it; padding is one too.
        rows = [[[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 7, 8, 9]], [[*range(7)], [7, 8], [9]]]
        for name, width in (("full_attention", 99), ("sliding_attention", window or 99)):
            mask = masks[name] if form == "per_layer_type" else masks
            if form == "one" and name == "full_attention":
                continue
            assert mask.shape == (2, 1, 10, 10)
            for row, sequences in enumerate(rows):
                sees = {(s[i], s[j]) for s in sequences for i in range(len(s)) for j in range(i + 1) if i - j < width}
                assert set(map(tuple, (mask[row, 0] == 0).nonzero().tolist())) == sees
                assert mask[row, 0][mask[row, 0] != 0].unique().tolist() == [torch.finfo(torch.float32).min]


def test_logits_return_to_their_solutions() -> None:
    logits = torch.arange(6.0).reshape(2, 3)
    index = torch.tensor([[5, 0], [-1, -1], [2, -1]])
    assert logits_of_solutions(logits, index).tolist() == [[5.0, 0.0], [0.0, 0.0], [2.0, 0.0]]
    classes = torch.stack([logits, logits + 10], dim=-1)
    assert logits_of_solutions(classes, index).tolist() == [
        [[5.0, 15.0], [0.0, 10.0]],
        [[0.0, 0.0], [0.0, 0.0]],
        [[2.0, 12.0], [0.0, 0.0]],
    ]


# --- Loss and gradients -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("attention_is_free")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3_moe", "llama", "mistral", "gemma3", "gpt2", "phi", "gpt_neox", "opt", "bert"]
)
def test_gradients_are_those_of_padded_rows(make_prm: MakePRM, family: str, attention: str) -> None:
    model, processor = make_prm(family, attn_implementation=attention)
    # OPT's tokenizer knows little but letters, and several solutions are to fit into a row.
    rows = datasets.Dataset.from_list(short_rows(steps=2 if family == "opt" else 6))
    features = tokenize_dataset(rows, processor)[0].to_list()
    # All that needs to know which steps are one solution's.
    loss_of = StepLoss(ranking="pairwise", normalization="solution", step_weighting="linear")
    found, tokens = {}, {}
    for wanted in ("none", "pack", "share"):
        packing = choose_packing(wanted, model, processor.max_length)
        batch = PackingCollator(processor, packing=packing)(features)
        labels = batch.pop("labels")
        tokens[wanted] = batch["input_ids"].numel()
        call: Any = model
        if packing is not None:
            call, batch = unpack(model, batch, packing, model.backbone.dtype)
        model.zero_grad()
        loss = loss_of(call(**batch)["logits"], labels)
        loss.backward()
        found[wanted] = loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for wanted in ("pack", "share"):
        assert found[wanted][0] == pytest.approx(found["none"][0], rel=1e-5)
        assert worst_difference(found[wanted][1], found["none"][1]) < 1e-5
    if family != "bert":
        assert tokens["share"] < tokens["pack"] < tokens["none"]


@pytest.mark.usefixtures("attention_is_free")
@pytest.mark.parametrize("packing", ["pack", "share"])
@pytest.mark.parametrize(("family", "batch", "accumulated"), [("qwen2", 3, 3), ("gemma3", 8, 1), ("opt", 5, 2)])
def test_the_trainer_takes_the_exact_step(
    prm_folder: Folder, exact: Any, tmp_path: Path, family: str, batch: int, accumulated: int, packing: str
) -> None:
    loss, gradients = exact(family)
    layout = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    rows = datasets.Dataset.from_list(short_rows())
    # OPT has dropout in its layers.
    options = {**layout, "packing": packing, "disable_dropout": True}
    trainer, seen = make_trainer(prm_folder(family), tmp_path, rows, sgd=True, **options)
    trainer.train()
    assert len(seen.steps) == 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert worst_difference(seen.steps[0], gradients) < 1e-5
    # Evaluation has padded rows, before and after.
    assert trainer.evaluate(rows)["eval_num_steps"] == sum(label != -100.0 for row in rows for label in row["labels"])


@pytest.mark.usefixtures("attention_is_free")
def test_losses_of_whole_solutions_are_those_of_padded_rows(prm_folder: Folder, tmp_path: Path) -> None:
    options = {"ranking_loss": "pqm", "step_weighting": "linear", "loss_normalization": "solution"}
    rows = datasets.Dataset.from_list(short_rows())
    found = []
    for packing in ("none", "share"):
        layout = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "packing": packing}
        trainer, seen = make_trainer(prm_folder("qwen2"), tmp_path, rows, sgd=True, **layout, **options)
        trainer.train()
        found.append((trainer.state.log_history[0]["loss"], seen.steps[0]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert worst_difference(found[1][1], found[0][1]) < 1e-5


@pytest.mark.usefixtures("attention_is_free")
def test_bfloat16_and_checkpointed_layers_see_the_same_rows(prm_folder: Folder, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(short_rows())
    found = {}
    for packing in ("none", "pack", "share"):
        options = {"packing": packing, "bf16": True, "gradient_checkpointing": True}
        trainer, seen = make_trainer(prm_folder("gemma3"), tmp_path, rows, sgd=True, **options)
        trainer.train()
        found[packing] = trainer.state.log_history[0]["loss"], seen.steps[0]
    for packing in ("pack", "share"):
        # Rows that see each other are off by more than the loss itself.
        assert found[packing][0] == pytest.approx(found["none"][0], rel=2e-2)
        assert worst_difference(found[packing][1], found["none"][1]) < 0.1


# --- Training -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("attention_is_free")
def test_fewer_tokens_are_computed(prm_folder: Folder, tmp_path: Path) -> None:
    # Two problems with four solutions each of 1 to 4 steps, so that half of the padded rows is padding and problem.
    labels = [[1.0] * steps for steps in (1, 2, 3, 4)] * 2
    rows = make_rows(labels)
    for number, row in enumerate(rows):
        row["problem"] = f"{PROBLEM} ({number // 4})"
    lengths, problems, counted = [], [], {}
    processor = PRMProcessor.from_pretrained(prm_folder("qwen2"))
    for row in rows:
        lengths.append(len(processor(row["problem"], row["steps"])["input_ids"][0]))
        problems.append(len(processor.tokenizer(f"Problem: {row['problem']}\n\n")["input_ids"]))
    for packing in ("none", "pack", "share"):
        options = {"per_device_train_batch_size": 8, "packing": packing}
        trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, datasets.Dataset.from_list(rows), sgd=True, **options)
        seen: list[int] = []
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        trainer.train()
        counted[packing] = sum(seen)
    assert counted["none"] == 8 * max(lengths)
    assert sum(lengths) <= counted["pack"] < counted["none"]
    # All that is not a problem, and each problem once; "Step 1: " is common too.
    least = sum(lengths) - 3 * problems[0] - 3 * problems[4]
    assert counted["share"] < 0.55 * counted["none"]
    assert counted["share"] < 1.25 * least


def test_packing_changes_neither_order_nor_steps(prm_folder: Folder, tmp_path: Path) -> None:
    # Three steps over shuffled records: the same records in each, so that the weights are the same.
    found = []
    for packing in ("none", "pack"):
        options = {"max_steps": 3, "learning_rate": 1e-3, "packing": packing, "logging_steps": 1}
        rows = datasets.Dataset.from_list(short_rows())
        trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, rows, per_device_train_batch_size=3, **options)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_solutions_of_a_problem_come_together() -> None:
    problems = [7, 8, 7, 9, 8, 7, 10, 7, 8]
    now = [0]
    sampler = ProblemSampler(problems, seed=3, epoch=lambda: now[0])
    orders = []
    for epoch in (0, 1, 0):
        now[0] = epoch
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(9))
        assert len(sampler) == 9
        seen = [problems[record] for record in orders[-1]]
        assert [problem for i, problem in enumerate(seen) if i == 0 or seen[i - 1] != problem] == list(
            dict.fromkeys(seen)
        )
    assert orders[0] == orders[2] != orders[1]
    assert list(ProblemSampler(problems, seed=4, epoch=lambda: 0)) != orders[0]
    # Neither problems nor their solutions stay in the order that they came in.
    firsts = {tuple(ProblemSampler(problems, seed=seed, epoch=lambda: 0)) for seed in range(20)}
    assert len({order[0] for order in firsts}) > 4
    assert len({tuple(record for record in order if problems[record] == 7) for order in firsts}) > 4


def test_batches_that_share_hold_whole_problems(prm_folder: Folder, tmp_path: Path) -> None:
    # Records 0, 1, 4, 5 have one problem, 2, 3, 6, 7 another.
    rows = make_rows([[1.0, 0.0]] * 8)
    for number, row in enumerate(rows):
        row["problem"] = f"{PROBLEM} ({number // 2 % 2})"
    dataset = datasets.Dataset.from_list(rows)
    options = {"per_device_train_batch_size": 4, "seed": 1}
    for packing, strategy in (("share", "random"), ("pack", "random"), ("share", "sequential")):
        options |= {"packing": packing, "train_sampling_strategy": strategy}
        trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, dataset, **options)
        problems = [set((batch["record"] // 2 % 2).tolist()) for batch in trainer.get_train_dataloader()]
        together = packing == "share" and strategy == "random"
        assert problems in ([{0}, {1}], [{1}, {0}]) if together else problems == [{0, 1}, {0, 1}]


@pytest.mark.usefixtures("attention_is_free")
def test_resuming_within_an_epoch_is_bit_exact(make_prm: MakePRM, tmp_path: Path) -> None:
    def run(folder: Path, resume: str | None = None) -> tuple[torch.Tensor, list[list[int]]]:
        model, processor = make_prm("gpt2")
        options = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 6}
        args = make_arguments(folder, max_steps=8, packing="share", **options)
        rows = datasets.Dataset.from_list(short_rows())
        trainer = PRMTrainer(model, args, processing_class=processor, train_dataset=rows)
        collate, seen = trainer.data_collator, []

        def seeing(features: list[dict[str, Any]]) -> Any:
            seen.append([row["record"] for row in features])
            return collate(features)

        trainer.data_collator = seeing
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), seen

    # Four steps an epoch: step 6 is in the midst of the second.
    whole, batches = run(tmp_path / "whole")
    resumed, rest = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-6"))
    assert len(batches) == 8
    assert batches[:4] != batches[4:]
    assert rest == batches[6:]
    assert torch.equal(whole, resumed)


def test_what_a_backbone_cannot_do_is_left_out_with_one_warning(
    make_prm: MakePRM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = datasets.Dataset.from_list(short_rows())
    model, processor = make_prm("bert")
    args = make_arguments(tmp_path, sgd=True, packing="share")
    trainer = PRMTrainer(model, args, processing_class=processor, train_dataset=rows)
    trainer.train()
    assert trainer.packing is None
    assert type(trainer.data_collator) is PRMDataCollator
    said = [record.message for record in caplog.records if record.name == "trainer.packing"]
    assert said == ["packing='share' is not possible with bert, rows are padded: its tokens see later ones"]
    caplog.clear()
    model, _ = make_prm("llama")
    model.backbone.config._attn_implementation_internal = "flex_attention"
    packing = choose_packing("share", model, 256)
    assert packing is not None
    assert (packing.shares, packing.by_masks) == (False, False)
    assert [record.message for record in caplog.records if record.name == "trainer.packing"] == [
        "packing='share' is not possible with llama, rows are packed without: flex_attention takes no 4D float mask"
    ]
    caplog.clear()
    # Only training packs, so that nothing is said where there is none.
    model, processor = make_prm("bert")
    PRMTrainer(model, make_arguments(tmp_path, packing="pack"), processing_class=processor)
    assert not [record for record in caplog.records if record.name == "trainer.packing"]


def test_tokens_of_another_release_train_without_sharing(
    prm_folder: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor = PRMProcessor.from_pretrained(prm_folder("qwen2"))
    tokens = tokenize_dataset(datasets.Dataset.from_list(short_rows()), processor)[0].remove_columns("problem_id")
    with caplog.at_level(logging.WARNING, "trainer.packing"):
        make_trainer(prm_folder("qwen2"), tmp_path, tokens, sgd=True, packing="share")[0].train()
    assert "the training set has no column 'problem_id'" in caplog.text


def test_packing_is_refused_where_it_cannot_be(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("qwen2")
    rows = datasets.Dataset.from_list(short_rows())
    collator = PRMDataCollator(processor)
    args = make_arguments(tmp_path, packing="pack", soft_labels="harden")
    with pytest.raises(ValueError, match="packing='pack' works in our collator; leave it at 'none', or data_collator"):
        PRMTrainer(model, args, processing_class=processor, train_dataset=rows, data_collator=collator)
    args = make_arguments(tmp_path, packing="pack", accelerator_config={"dispatch_batches": True})
    with pytest.raises(ValueError, match="dispatch_batches=True cuts packed batches apart"):
        PRMTrainer(model, args, processing_class=processor, train_dataset=rows)


def test_the_labels_are_those_of_small_training() -> None:
    assert [row["labels"] for row in short_rows()] == [row[:6] for row in LABELS]
