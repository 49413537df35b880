"""`PRMForStepScoring`: scores against an independent computation, what may not change them, saving, dtypes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import DECODERS, FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from modeling_prm import PRMConfig, PRMForStepScoring, PRMProcessor, StepScoringOutput

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
Folder = Callable[[str], Path]

PROBLEMS = ["What is 12 + 30?", "Ann has 3 apples.", "the quick brown fox jumps over the lazy dog"]
SOLUTIONS = [["12 + 30 = 42.", "So the answer is 42."], ["3 * 4 = 12."], ["again", "and again.", "It is (12)."]]
# OPT numbers positions by its mask and separates no packed rows; encoders are bidirectional.
PACKING = [family for family in DECODERS if family != "opt"]
EXACT = {"rtol": 0.0, "atol": 1e-5}


def assert_rows(logits: torch.Tensor, expected: list[torch.Tensor]) -> None:
    """Each row of logits (B, S) begins with the expected ones and is 0 after them."""
    assert logits.shape[0] == len(expected)
    for row, values in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[: len(values)], values, **EXACT)
        assert not row[len(values) :].any()


@torch.no_grad()
def score(model: PRMForStepScoring, **inputs: Any) -> torch.Tensor:
    return model(**inputs).logits


def one_by_one(model: PRMForStepScoring, processor: PRMProcessor) -> list[torch.Tensor]:
    """Logits of the three solutions, each read alone and without padding."""
    pairs = zip(PROBLEMS, SOLUTIONS, strict=True)
    return [score(model, **processor(problem, steps, return_tensors="pt"))[0] for problem, steps in pairs]


def head_by_numpy(model: PRMForStepScoring, hidden: torch.Tensor) -> np.ndarray:
    """The value head's logits (..., K) in float64 from hidden states (..., H)."""
    weights = {name: value.double().numpy() for name, value in model.value_head.state_dict().items()}
    values = hidden.double().numpy()
    if "dense.weight" in weights:
        values = np.maximum(values @ weights["dense.weight"].T + weights["dense.bias"], 0.0)
    return values @ weights["out.weight"].T + weights["out.bias"]


def head_input(model: PRMForStepScoring, caught: list[torch.Tensor]) -> None:
    model.value_head.register_forward_pre_hook(lambda _, args: caught.append(args[0].detach().clone()))


# ---- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_an_independent_computation(
    family: str, head_type: str, make_prm: MakePRM, backbone_folder: Folder
) -> None:
    model, processor = make_prm(family, head_type=head_type)
    # The backbone as Transformers loads it, with its separator's row worked out here.
    backbone = AutoModel.from_pretrained(backbone_folder(family)).eval()
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder(family))
    weight = backbone.get_input_embeddings().weight
    with torch.no_grad():
        weight[len(tokenizer)] = torch.from_numpy(weight[: len(tokenizer)].numpy().mean(axis=0))
    for problem, steps in zip(PROBLEMS, SOLUTIONS, strict=True):
        ids = torch.tensor(processor(problem, steps)["input_ids"])
        with torch.no_grad():
            hidden = backbone(input_ids=ids).last_hidden_state[0]
        expected = head_by_numpy(model, hidden[ids[0] == len(tokenizer)])[:, 0]
        with torch.no_grad():
            output = model(**processor(problem, steps, return_tensors="pt"))
        assert output.logits.dtype == output.step_probs.dtype == torch.float32
        np.testing.assert_allclose(output.logits[0].numpy(), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(output.step_probs[0].numpy(), 1 / (1 + np.exp(-expected)), rtol=0, atol=1e-5)
        assert output.step_mask.tolist() == [[True] * len(steps)]
        assert output.loss is None
    assert (model.value_head.dense is None) == (head_type == "linear")


@pytest.mark.parametrize("family", FAMILIES)
def test_batching_and_padding_change_no_logit(family: str, make_prm: MakePRM) -> None:
    model, processor = make_prm(family)
    alone = one_by_one(model, processor)
    # What is compared is not all the same.
    assert torch.cat(alone).std() > 0.05
    for padding_side in ("right", "left"):
        batch = processor(PROBLEMS, SOLUTIONS, padding_side=padding_side, return_tensors="pt")
        assert_rows(score(model, **batch), alone)
        derived = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert_rows(score(model, **derived), alone)
    # Another order, another batch size, and seven columns of padding more on the right and five on the left.
    batch = processor(PROBLEMS[::-1], SOLUTIONS[::-1], return_tensors="pt")
    assert_rows(score(model, **batch), alone[::-1])
    assert_rows(score(model, **processor(PROBLEMS[:2], SOLUTIONS[:2], return_tensors="pt")), alone[:2])
    positions = batch["step_positions"]
    wider = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (5, 7), value=processor.pad_token_id),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (5, 7)),
        "step_positions": torch.where(positions >= 0, positions + 5, -1),
    }
    assert_rows(score(model, **wider), alone[::-1])


def test_ids_under_the_padding_change_no_logit(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    for padding_side in ("right", "left"):
        batch = processor(PROBLEMS, SOLUTIONS, padding_side=padding_side, return_tensors="pt")
        filler = torch.randint(3, 300, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
        batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], filler)
        assert_rows(score(model, **batch), one_by_one(model, processor))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_score_offset_reads_one_token_earlier(family: str, make_prm: MakePRM) -> None:
    model, processor = make_prm(family)
    model.config.score_offset = -1
    inputs = processor(PROBLEMS[0], SOLUTIONS[0], return_tensors="pt")
    caught: list[torch.Tensor] = []
    head_input(model, caught)
    derived = score(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with torch.no_grad():
        hidden = model.backbone(input_ids=inputs["input_ids"]).last_hidden_state
    before = [position - 1 for position in inputs["step_positions"][0].tolist()]
    torch.testing.assert_close(caught[0], hidden[:, before], **EXACT)
    earlier = PRMProcessor(processor.tokenizer, **{**model.config.layout, "score_offset": -1})
    given = score(model, **earlier(PROBLEMS[0], SOLUTIONS[0], return_tensors="pt"))
    assert torch.equal(given, derived)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_separator_that_is_the_padding_token_too_counts_only_where_it_ends_a_step(
    padding_side: str, backbone_folder: Callable[[str], Path]
) -> None:
    model, processor = PRMForStepScoring.from_backbone(backbone_folder("qwen2"), separator_token="<|endoftext|>")
    batch = processor(PROBLEMS, SOLUTIONS, padding_side=padding_side, return_tensors="pt")
    assert processor.pad_token_id != processor.separator_token_id
    batch["input_ids"][batch["attention_mask"] == 0] = processor.separator_token_id
    given = model(**batch)
    positions = batch.pop("step_positions")
    derived = model(**batch)
    assert torch.equal(derived.step_mask, positions >= 0)
    assert torch.equal(derived.logits, given.logits)


def test_input_past_the_backbones_positions_is_refused(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    unlimited = PRMProcessor(processor.tokenizer, **{**model.config.layout, "max_length": None})
    step = "1 + 1 = 2. " * 40
    batch = unlimited(PROBLEMS[0], [step], return_tensors="pt")
    assert batch["input_ids"].shape[1] > 256
    with pytest.raises(ValueError, match=r"tokens long, the backbone reads 256"):
        model(**batch)


def test_a_step_is_scored_by_what_stands_before_it_only(make_prm: MakePRM) -> None:
    decoder, processor = make_prm("llama")
    encoder, encoder_processor = make_prm("bert")
    for model, prepare, later_steps_count in ((decoder, processor, False), (encoder, encoder_processor, True)):
        short = score(model, **prepare(PROBLEMS[2], SOLUTIONS[2][:1], return_tensors="pt"))[0, 0]
        long = score(model, **prepare(PROBLEMS[2], SOLUTIONS[2], return_tensors="pt"))[0, 0]
        assert bool((short - long).abs() > 1e-3) == later_steps_count


@pytest.mark.parametrize("family", PACKING)
def test_packed_rows_equal_rows_alone(family: str, make_prm: MakePRM) -> None:
    model, processor = make_prm(family)
    encoded = processor.encode(PROBLEMS, SOLUTIONS)
    ids, position_ids, step_positions = [], [], []
    for item in encoded:
        step_positions += [len(ids) + position for position in item.step_positions]
        position_ids += range(len(item.input_ids))
        ids += item.input_ids
    packed = score(
        model,
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([position_ids]),
        step_positions=torch.tensor([step_positions]),
    )
    torch.testing.assert_close(packed[0], torch.cat(one_by_one(model, processor)), **EXACT)


@pytest.mark.parametrize("family", DECODERS)
def test_cached_prefix_equals_the_full_pass(family: str, make_prm: MakePRM) -> None:
    model, processor = make_prm(family)
    # Two problems of unequal length, padded on the left; their steps follow, padded on the right.
    encoded = processor.encode(PROBLEMS[1:], SOLUTIONS[1:])
    cuts = [len(item.input_ids) for item in processor.encode(PROBLEMS[1:], [[], []])]
    assert cuts[0] != cuts[1]
    pad, columns = processor.pad_token_id, {"prefix": [], "prefix_mask": [], "ids": [], "mask": [], "positions": []}
    for item, cut in zip(encoded, cuts, strict=True):
        prefix, rest = item.input_ids[:cut], item.input_ids[cut:]
        front = max(cuts) - cut
        back = max(len(item.input_ids) - cut for item, cut in zip(encoded, cuts, strict=True)) - len(rest)
        columns["prefix"].append([pad] * front + prefix)
        columns["prefix_mask"].append([0] * front + [1] * cut)
        columns["ids"].append(rest + [pad] * back)
        columns["mask"].append(columns["prefix_mask"][-1] + [1] * len(rest) + [0] * back)
        positions = [position - cut for position in item.step_positions]
        columns["positions"].append(positions + [-1] * (3 - len(positions)))
    tensors = {name: torch.tensor(rows) for name, rows in columns.items()}
    with torch.no_grad():
        problem = model(input_ids=tensors["prefix"], attention_mask=tensors["prefix_mask"], use_cache=True)
        output = model(
            input_ids=tensors["ids"],
            attention_mask=tensors["mask"],
            step_positions=tensors["positions"],
            past_key_values=problem.past_key_values,
        )
    assert not problem.step_mask.any()
    assert_rows(output.logits, one_by_one(model, processor)[1:])


def test_no_cache_is_kept_unless_asked_for(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    inputs = processor(PROBLEMS[0], SOLUTIONS[0], return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).past_key_values is None
        assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == inputs["input_ids"].shape[1]


def test_inputs_embeds_take_the_place_of_ids(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    batch = processor(PROBLEMS, SOLUTIONS, padding_side="left", return_tensors="pt")
    expected = score(model, **batch)
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(score(model, inputs_embeds=embeds, **batch), expected, **EXACT)
    with pytest.raises(ValueError, match="step_positions are needed here: without input_ids"):
        model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])


@pytest.mark.parametrize("family", ["roberta", "bert", "gpt2"])
def test_an_input_of_as_many_tokens_as_the_config_says_can_be_read(family: str, make_prm: MakePRM) -> None:
    model, _ = make_prm(family)
    positions = model.config.max_positions
    assert positions == model.config.max_length == 256
    ids = torch.full((1, positions + 1), 50)
    assert score(model, input_ids=ids[:, :positions], step_positions=torch.tensor([[positions - 1]])).isfinite().all()
    with pytest.raises(ValueError, match="257 tokens long, the backbone reads 256"):
        score(model, input_ids=ids, step_positions=torch.tensor([[positions]]))


# ---- classes, labels, outputs -------------------------------------------------------------------------------------


def test_classes_are_weighted_by_hand(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama", num_labels=3, class_weights=[1.0, 0.25, 0.0])
    caught: list[torch.Tensor] = []
    head_input(model, caught)
    labels = torch.tensor([[0.0, 2.0, -100.0], [1.0, -100.0, -100.0], [-100.0, 1.0, 0.0]])
    with torch.no_grad():
        output = model(**processor(PROBLEMS, SOLUTIONS, return_tensors="pt"), labels=labels)
    assert output.logits.shape == (3, 3, 3)
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=bool)
    assert np.array_equal(output.step_mask.numpy(), mask)
    logits = np.where(mask[..., None], head_by_numpy(model, caught[0]), 0.0)
    np.testing.assert_allclose(output.logits.numpy(), logits, rtol=0, atol=1e-5)
    exp = np.exp(logits)
    probs = (exp[..., 0] + 0.25 * exp[..., 1]) / exp.sum(-1)
    np.testing.assert_allclose(output.step_probs.numpy(), np.where(mask, probs, 0.0), rtol=0, atol=1e-5)
    terms = [
        -np.log(exp[b, s, k] / exp[b, s].sum()) for b, s, k in [(0, 0, 0), (0, 1, 2), (1, 0, 1), (2, 1, 1), (2, 2, 0)]
    ]
    assert output.loss.item() == pytest.approx(sum(terms) / 5, abs=1e-5)


def test_loss_of_one_logit(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    batch = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    labels = torch.tensor([[1.0, 0.0, -100.0], [0.25, -100.0, -100.0], [1.0, -100.0, 0.0]])
    with torch.no_grad():
        output = model(**batch, labels=labels)
        of_ten = model(**batch, labels=labels, num_items_in_batch=torch.tensor(10))
    p = output.step_probs.double().numpy()
    total = -np.log([p[0, 0], 1 - p[0, 1], p[2, 0], 1 - p[2, 2]]).sum()
    total -= 0.25 * np.log(p[1, 0]) + 0.75 * np.log(1 - p[1, 0])
    assert output.loss.item() == pytest.approx(total / 5, abs=1e-5)
    assert of_ten.loss.item() == pytest.approx(total / 10, abs=1e-5)


@pytest.mark.parametrize("classes", [{}, {"num_labels": 3, "class_weights": [1.0, 0.5, 0.0]}])
def test_the_temperature_divides_the_logits_of_probabilities_only(
    classes: dict[str, Any], make_prm: MakePRM, tmp_path: Path
) -> None:
    model, processor = make_prm("llama", **classes)
    batch = processor(PROBLEMS[2], SOLUTIONS[2], return_tensors="pt")
    labels = torch.ones(batch["step_positions"].shape)
    with torch.no_grad():
        plain = model(**batch, labels=labels)
    model.config.temperature = 2.5
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        warm = model(**batch, labels=labels)
        loaded = PRMForStepScoring.from_pretrained(tmp_path)(**batch)
    assert torch.equal(warm.logits, plain.logits)
    assert torch.equal(warm.loss, plain.loss)
    logits = plain.logits[0].double().tolist()
    if classes:
        powers = [[math.exp(logit / 2.5) for logit in step] for step in logits]
        expected = [(right + 0.5 * neutral) / (right + neutral + wrong) for right, neutral, wrong in powers]
    else:
        expected = [1.0 / (1.0 + math.exp(-logit / 2.5)) for logit in logits]
    assert warm.step_probs[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert loaded.step_probs[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert (warm.step_probs - plain.step_probs).abs().max() > 1e-3


def test_steps_that_are_not_there_have_probability_zero(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    with torch.no_grad():
        output = model(**processor(PROBLEMS, SOLUTIONS, return_tensors="pt"))
    assert output.step_mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert not output.step_probs[~output.step_mask].any()
    assert (output.step_probs[output.step_mask] > 0).all()


def test_labels_of_another_shape_are_refused(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    batch = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    message = r"labels of shape \(3, 4\) do not match step_positions of shape \(3, 3\); give one label a step"
    with pytest.raises(ValueError, match=message):
        model(**batch, labels=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"labels of shape \(3, \d+\) do not match"):
        model(**batch, labels=torch.zeros(batch["input_ids"].shape))


def test_positions_are_needed_where_the_separator_is_ordinary_text(make_prm: MakePRM) -> None:
    model, processor = make_prm("gpt2", separator_token="\n", step_joiner="")
    assert not model.config.separator_is_reserved
    inputs = processor("a\nb", ["c\nd", "e"], return_tensors="pt")
    assert score(model, **inputs).shape == (1, 2)
    with pytest.raises(
        ValueError, match=r"step_positions are needed here: the separator .* cannot tell where steps end"
    ):
        model(input_ids=inputs["input_ids"])


def test_return_dict_false_gives_a_tuple(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    inputs = processor(PROBLEMS[0], SOLUTIONS[0], return_tensors="pt")
    labels = torch.tensor([[1.0, 0.0]])
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        loss, logits, step_probs, step_mask = model(**inputs, labels=labels, return_dict=False)
    assert isinstance(output, StepScoringOutput)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert torch.equal(step_probs, output.step_probs)
    assert torch.equal(step_mask, output.step_mask)


def test_hidden_states_and_attentions_come_out_where_asked_for(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama", attn_implementation="eager")
    inputs = processor(PROBLEMS[0], SOLUTIONS[0], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert model(**inputs).hidden_states is None
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, length, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(1, 4, length, length)] * 2


def test_scoring_leaves_everything_as_it_was(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    batch = dict(processor(PROBLEMS, SOLUTIONS, return_tensors="pt"))
    config, rng = model.config.to_json_string(), torch.get_rng_state()
    copies = {name: tensor.clone() for name, tensor in batch.items()}
    extra = {"output_hidden_states": True}
    for training in (False, True):
        model.train(training)
        score(model, **batch, **extra)
        assert model.training is training
        assert model.backbone.training is training
        if not training:
            assert torch.equal(torch.get_rng_state(), rng)
    assert extra == {"output_hidden_states": True}
    assert batch.keys() == copies.keys()
    assert all(torch.equal(batch[name], copies[name]) for name in batch)
    assert model.config.to_json_string() == config


def test_dropout_of_the_head_is_at_work_in_training_only(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama", head_dropout=0.5)
    inputs = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    assert torch.equal(score(model, **inputs), score(model, **inputs))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(score(model, **inputs), score(model, **inputs))


# ---- precision, compilation, memory -------------------------------------------------------------------------------


def cast_when_loaded(folder: Path) -> PRMForStepScoring:
    return AutoModel.from_pretrained(folder, dtype=torch.bfloat16)


def cast_by_to(folder: Path) -> PRMForStepScoring:
    return AutoModel.from_pretrained(folder).to(torch.bfloat16)


def cast_by_from_config(folder: Path) -> PRMForStepScoring:
    return AutoModel.from_config(PRMConfig.from_pretrained(folder), dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("make", [cast_when_loaded, cast_by_to, cast_by_from_config])
def test_head_computes_in_float32_on_a_bfloat16_backbone(
    make: Callable[[Path], PRMForStepScoring], prm_folder: Folder
) -> None:
    model, processor = make(prm_folder("llama")), PRMProcessor.from_pretrained(prm_folder("llama"))
    assert next(model.backbone.parameters()).dtype == torch.bfloat16
    if make is not cast_by_to:
        assert {parameter.dtype for parameter in model.value_head.parameters()} == {torch.float32}
    caught: list[torch.Tensor] = []
    head_input(model, caught)
    with torch.no_grad():
        output = model(**processor(PROBLEMS[2], SOLUTIONS[2], return_tensors="pt"))
    assert caught[0].dtype == torch.bfloat16
    assert output.logits.dtype == output.step_probs.dtype == torch.float32
    # In bfloat16 the logits would be off by a part in 256.
    np.testing.assert_allclose(output.logits[0].numpy(), head_by_numpy(model, caught[0])[0, :, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_head_computes_in_float32_under_autocast(head_type: str, make_prm: MakePRM) -> None:
    model, processor = make_prm("llama", head_type=head_type)
    caught: list[torch.Tensor] = []
    head_input(model, caught)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**processor(PROBLEMS[2], SOLUTIONS[2], return_tensors="pt"))
    assert output.logits.dtype == torch.float32
    np.testing.assert_allclose(output.logits[0].numpy(), head_by_numpy(model, caught[0])[0, :, 0], rtol=1e-5, atol=1e-6)
    full = score(model, **processor(PROBLEMS[2], SOLUTIONS[2], return_tensors="pt"))
    assert 1e-4 < (output.logits - full).abs().max() < 0.5


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "modernbert"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, make_prm: MakePRM) -> None:
    model, processor = make_prm(family, head_dropout=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    labels = torch.tensor([[1.0, 0.0, -100.0], [0.5, -100.0, -100.0], [1.0, 1.0, 0.0]])
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.backbone.modules())
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    # A parameter without a gradient would break training on several processes.
    assert all(gradient is not None for gradient in gradients[0].values())
    assert any(gradient.abs().max() > 1e-3 for name, gradient in gradients[0].items() if name.startswith("backbone"))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_compiled_in_one_graph_gives_the_same_logits(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    batch = dict(processor(PROBLEMS, SOLUTIONS, return_tensors="pt"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(score(compiled, **batch), score(model, **batch), **EXACT)


class HostReads(TorchDispatchMode):
    """Counts the times that a tensor's value is read back to Python, which waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_labels", [1, 3])
def test_no_value_is_read_back_where_positions_are_given(num_labels: int, make_prm: MakePRM) -> None:
    options = {} if num_labels == 1 else {"num_labels": 3, "class_weights": [1.0, 0.5, 0.0]}
    model, processor = make_prm("llama", **options)
    batch = dict(processor(PROBLEMS, SOLUTIONS, return_tensors="pt"))
    labels = torch.zeros(batch["step_positions"].shape)
    position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), HostReads() as of_backbone:
        model.backbone(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=position_ids,
            use_cache=False,
        )
    with torch.no_grad(), HostReads() as given:
        model(**batch, labels=labels, num_items_in_batch=torch.tensor(6))
    assert given.count == of_backbone.count
    del batch["step_positions"]
    with torch.no_grad(), HostReads() as derived:
        model(**batch)
    assert derived.count > given.count  # the width S of the output is read, so the count is at work


def test_head_saved_in_bfloat16_loads_in_float32(prm_folder: Folder, tmp_path: Path) -> None:
    cast_by_to(prm_folder("llama")).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["value_head.out.weight"].dtype == torch.bfloat16
    for options in ({}, {"dtype": torch.bfloat16}, {"dtype": "auto"}):
        model = AutoModel.from_pretrained(tmp_path, **options)
        assert {parameter.dtype for parameter in model.value_head.parameters()} == {torch.float32}
        assert next(model.backbone.parameters()).dtype == torch.bfloat16


# ---- saving and loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_gives_the_same_logits(family: str, make_prm: MakePRM, prm_folder: Folder) -> None:
    model, processor = make_prm(family)
    loaded = AutoModel.from_pretrained(prm_folder(family))
    assert type(loaded) is PRMForStepScoring
    assert not loaded.training
    batch = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    torch.testing.assert_close(score(loaded, **batch), score(model, **batch), **EXACT)


def test_sharded_checkpoint(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("llama", head_type="mlp")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    loaded = AutoModel.from_pretrained(tmp_path)
    batch = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    torch.testing.assert_close(score(loaded, **batch), score(model, **batch), **EXACT)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"backbone": "cpu", "value_head": "cpu"}])
def test_device_map(device_map: Any, prm_folder: Folder) -> None:
    processor = PRMProcessor.from_pretrained(prm_folder("llama"))
    batch = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    expected = score(AutoModel.from_pretrained(prm_folder("llama")), **batch)
    loaded = AutoModel.from_pretrained(prm_folder("llama"), device_map=device_map)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    torch.testing.assert_close(score(loaded, **batch), expected, **EXACT)


def test_a_model_split_by_memory_keeps_layers_whole_and_scores(prm_folder: Folder, tmp_path: Path) -> None:
    processor = PRMProcessor.from_pretrained(prm_folder("llama"))
    batch = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    expected = score(AutoModel.from_pretrained(prm_folder("llama")), **batch)
    loaded = AutoModel.from_pretrained(
        prm_folder("llama"), device_map="auto", max_memory={"cpu": "100KB"}, offload_folder=tmp_path
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    # Nothing inside a decoder layer is placed by itself: its residual would sit elsewhere.
    assert not [name for name in loaded.hf_device_map if "self_attn" in name or "mlp" in name]
    torch.testing.assert_close(score(loaded, **batch), expected, **EXACT)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert"])
def test_attention_implementation_reaches_the_backbone(family: str, prm_folder: Folder) -> None:
    processor = PRMProcessor.from_pretrained(prm_folder(family))
    batch = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    scores = {}
    for name in ("eager", "sdpa"):
        model = AutoModel.from_pretrained(prm_folder(family), attn_implementation=name)
        assert model.backbone.config._attn_implementation == model.config._attn_implementation == name
        scores[name] = score(model, **batch)
        attentions = model(**batch, output_attentions=True).attentions if name == "eager" else None
        assert (name == "eager") == (attentions is not None and len(attentions) == 2)
    torch.testing.assert_close(scores["eager"], scores["sdpa"], **EXACT)


def test_resized_embeddings_work_and_are_saved(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("llama")
    batch = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    expected = score(model, **batch)
    model.resize_token_embeddings(420)
    assert model.get_input_embeddings().weight.shape == (420, 32)
    assert model.config.text_config.vocab_size == 420
    torch.testing.assert_close(score(model, **batch), expected, **EXACT)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape == (420, 32)
    torch.testing.assert_close(score(loaded, **batch), expected, **EXACT)


def test_a_language_model_is_refused_by_from_pretrained(backbone_folder: Folder, tmp_path: Path) -> None:
    config = transformers.LlamaConfig.from_pretrained(backbone_folder("llama"))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"this is a 'llama' checkpoint, not a process reward model.*from_backbone"):
        PRMForStepScoring.from_pretrained(tmp_path)
    # Even with a fitting config given, which leaves at least the head random.
    for folder in (tmp_path, backbone_folder("llama")):
        with pytest.raises(ValueError, match=r"lacks \d+ weights of this PRM .*PRMForStepScoring.from_backbone"):
            PRMForStepScoring.from_pretrained(folder, config=PRMConfig(text_config=config))


def test_a_checkpoint_without_its_head_is_refused(make_prm: MakePRM, tmp_path: Path) -> None:
    model, _ = make_prm("llama")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("value_head")}
    assert len(kept) == len(weights) - 2
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = r"lacks 2 weights of this PRM \(value_head.out.bias, value_head.out.weight\), which would be random"
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path)


def test_loading_info_is_given_where_asked_for(prm_folder: Folder) -> None:
    model, info = PRMForStepScoring.from_pretrained(prm_folder("llama"), output_loading_info=True)
    assert isinstance(model, PRMForStepScoring)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_second_load_in_one_process_is_the_same_class(prm_folder: Folder) -> None:
    first, second = (AutoModel.from_pretrained(prm_folder("llama")) for _ in range(2))
    assert type(first) is type(second) is PRMForStepScoring


def test_a_config_without_a_backbone_makes_no_model() -> None:
    with pytest.raises(ValueError, match=r"PRMConfig\.text_config is None; give it the configuration of a backbone"):
        PRMForStepScoring(PRMConfig())


def test_saved_config_names_the_class_and_ships_its_code(prm_folder: Folder) -> None:
    config = json.loads((prm_folder("llama") / "config.json").read_text())
    assert config["architectures"] == ["PRMForStepScoring"]
    assert config["auto_map"]["AutoModel"] == "modeling_prm.PRMForStepScoring"
    assert config["auto_map"]["AutoConfig"] == "configuration_prm.PRMConfig"


# ---- quantization -------------------------------------------------------------------------------------------------


def torchao_int8() -> Any:
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao, the extra quantization")
    return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())


def quanto_int8() -> Any:
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    return transformers.QuantoConfig(weights="int8")


def bitsandbytes_int8() -> Any:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("scheme", [torchao_int8, quanto_int8, bitsandbytes_int8])
def test_quantized_backbone_keeps_its_head(scheme: Callable[[], Any], prm_folder: Folder) -> None:
    quantization = scheme()
    processor = PRMProcessor.from_pretrained(prm_folder("llama"))
    full = AutoModel.from_pretrained(prm_folder("llama"))
    model = AutoModel.from_pretrained(prm_folder("llama"), quantization_config=quantization, dtype=torch.float32)
    linear = model.backbone.layers[0].mlp.up_proj
    assert type(linear) is not torch.nn.Linear or type(linear.weight) is not torch.nn.Parameter
    assert type(model.value_head.out) is torch.nn.Linear
    assert type(model.value_head.out.weight) is torch.nn.Parameter
    assert torch.equal(model.value_head.out.weight, full.value_head.out.weight)
    batch = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    expected, scores = score(full, **batch), score(model, **batch)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, expected)
    torch.testing.assert_close(scores, expected, rtol=0.0, atol=0.2)
