"""Completions of a causal language model and of a server: what they are asked, how they end, and what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from completions_stand_in import CompletionsStandIn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from modeling_prm.http_client import JsonClient
from trainer.labelling_rollouts import CausalLMRollouts, Rollout
from trainer.labelling_server import ServerRollouts

PROBLEM = "What is 12 + 30?"
PREFIXES = [(), ("12 + 3 = 15.",), ("12 + 3 = 15.", "15 + 4 = 19.")]


def language_model(family: str = "llama", positions: int = 256) -> tuple[Any, PreTrainedTokenizerBase]:
    """A random model whose weights are large enough that its text depends on what it reads."""
    make_config, make_tokenizer = tiny_models.FAMILIES[family]
    config, tokenizer = make_config(), make_tokenizer()
    config.get_text_config().max_position_embeddings = positions
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def rollouts(family: str = "llama", *, positions: int = 256, **options: Any) -> CausalLMRollouts:
    return CausalLMRollouts(
        *language_model(family, positions), **{"max_new_tokens": 8, "temperature": 1.0, "batch_size": 5, **options}
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3", "mistral"])
def test_prompts_are_computed_once_and_completions_are_those_of_the_full_pass(family: str) -> None:
    if family not in tiny_models.FAMILIES:
        pytest.skip(f"no tiny {family}")
    generator = rollouts(family)
    lengths = [len(generator._prompts.prompt_ids(PROBLEM, prefix)) for prefix in PREFIXES]
    shared = generator(PROBLEM, PREFIXES, 4)
    computed = generator.num_prompt_tokens
    generator.num_prompt_tokens, generator._shares = 0, False
    assert generator(PROBLEM, PREFIXES, 4) == shared
    assert generator.num_prompt_tokens == 4 * sum(lengths)
    assert [len(completions) for completions in shared] == [4, 4, 4]
    assert len({rollout.text for completions in shared for rollout in completions}) > 6
    # The longest prompt, and where a shorter one branches off a token or two: its last ids differ from what follows.
    assert lengths[-1] - 1 <= computed <= lengths[-1] + 3


def test_a_call_depends_on_its_arguments_and_the_seed_alone() -> None:
    generator = rollouts()
    state = torch.random.get_rng_state()
    first = generator(PROBLEM, PREFIXES, 4)
    torch.manual_seed(7)
    generator("Another?", PREFIXES, 2)
    assert generator(PROBLEM, PREFIXES, 4) == first == rollouts()(PROBLEM, PREFIXES, 4)
    assert rollouts(seed=1)(PROBLEM, PREFIXES, 4) != first
    assert generator("What is 12 + 31?", PREFIXES, 4) != first
    torch.random.set_rng_state(state)
    generator(PROBLEM, PREFIXES, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not generator.model.training


def test_completions_end_at_the_end_of_sequence_at_a_stop_string_or_are_cut() -> None:
    generator = rollouts("qwen2", stop_strings=["###"])
    end = generator._end_ids[0]
    four = generator.tokenizer("4")["input_ids"]
    stop = generator.tokenizer("4###5")["input_ids"]
    assert generator._read([*four, end, end], None) == Rollout("4", len(four) + 1, False)
    assert generator._read([*four, *four], None) == Rollout("44", 2 * len(four), True)
    # The end-of-sequence token behind a stop string is padding.
    assert generator._read([*stop, end], len(stop)) == Rollout("4", len(stop), False)


def test_generation_stops_at_a_stop_string() -> None:
    plain = rollouts(max_new_tokens=24)(PROBLEM, [()], 6)[0]
    sign = next(sign for rollout in plain for sign in rollout.text[1:] if sign.isascii() and sign.isprintable())
    stopped = rollouts(max_new_tokens=24, stop_strings=[sign])(PROBLEM, [()], 6)[0]
    assert all(sign not in rollout.text for rollout in stopped)
    assert any(not rollout.is_cut and rollout.num_tokens < 24 for rollout in stopped)


def test_a_prefix_that_leaves_no_room_has_no_completion() -> None:
    length = len(rollouts()._prompts.prompt_ids(PROBLEM, PREFIXES[1]))
    generator = rollouts(positions=length + 2)
    found = generator(PROBLEM, PREFIXES, 3)
    assert [len(completions) for completions in found] == [3, 3, 0]
    # And in what room there is.
    assert max(rollout.num_tokens for rollout in found[1]) <= 2
    with pytest.raises(ValueError, match="so no completion fits"):
        generator(PROBLEM, PREFIXES[2:], 3)


def test_without_sampling_there_is_nothing_to_estimate() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        rollouts(temperature=0)
    with JsonClient("http://127.0.0.1:1") as client, pytest.raises(ValueError, match="temperature must be above 0"):
        ServerRollouts(client, temperature=0.0)


def write(body: dict[str, Any], index: int) -> str:
    return f"choice {index}" + "…" * (index == 1)


def asking(server: CompletionsStandIn, **options: Any) -> ServerRollouts:
    client = JsonClient(server.url, timeout=0.5, retries=2, first_wait=0.01)
    return ServerRollouts(client, **{"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, **options})


def test_a_server_is_asked_once_a_prefix_and_answers_in_order() -> None:
    with CompletionsStandIn(write) as server:
        generator = asking(server, step_joiner="\n", stop_strings=["Problem"])
        server.bodies.clear()
        found = generator(PROBLEM, PREFIXES, 3)
    # Six words for each prefix, "choice 1…" among them.
    assert found == [[Rollout("choice 0", 2, False), Rollout("choice 1", 2, True), Rollout("choice 2", 2, False)]] * 3
    bodies = sorted(server.bodies, key=lambda body: len(body["prompt"]))
    assert [body["prompt"] for body in bodies] == [
        f"Problem: {PROBLEM}\n\n",
        f"Problem: {PROBLEM}\n\n12 + 3 = 15.\n",
        f"Problem: {PROBLEM}\n\n12 + 3 = 15.\n15 + 4 = 19.\n",
    ]
    seeds = {body.pop("seed") for body in bodies}
    assert len(seeds) == 3
    for body in bodies:
        del body["prompt"]
        assert body == {
            "model": "policy",
            "n": 3,
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "stop": ["Problem"],
        }


def test_the_seed_of_a_request_follows_from_seed_problem_and_prefix() -> None:
    def seeds(**options: Any) -> list[int]:
        with CompletionsStandIn(write) as server:
            generator = asking(server, **options)
            server.bodies.clear()
            generator(PROBLEM, PREFIXES, 3)
            return sorted(body["seed"] for body in server.bodies)

    assert seeds() == seeds() != seeds(seed=1)


def test_with_a_tokenizer_the_prompt_is_its_chat_template_as_ids() -> None:
    tokenizer = tiny_models.byte_level_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}<a>"
    with CompletionsStandIn(write) as server:
        generator = asking(server, tokenizer=tokenizer)
        for problem in (PROBLEM, f"What is {tokenizer.eos_token}?"):
            server.bodies.clear()
            generator(problem, PREFIXES[1:2], 1)
            ids = server.bodies[0]["prompt"]
            assert tokenizer.decode(ids) == f"<u>{problem}</u><a>12 + 3 = 15.\n\n"
            assert tokenizer.eos_token_id not in ids


def test_without_a_chat_template_ids_begin_as_the_model_reads_texts() -> None:
    tokenizer = tiny_models.sentencepiece_bpe_tokenizer()
    with CompletionsStandIn(write) as server:
        generator = asking(server, tokenizer=tokenizer)
        for problem in (PROBLEM, f"What is {tokenizer.eos_token}?"):
            server.bodies.clear()
            generator(problem, [()], 1)
            ids = server.bodies[0]["prompt"]
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.bos_token_id not in ids[1:]
        # Where the template has it, it is not doubled.
        generator = asking(server, tokenizer=tokenizer, prompt_template=tokenizer.bos_token + "{problem}")
        server.bodies.clear()
        generator(PROBLEM, [()], 1)
        assert server.bodies[0]["prompt"].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("fault", [500, 429, "cut", "slow", "nonsense {", "few", '{"choices": [{"text": null}]}'])
def test_faults_that_pass_are_passed_over(fault: int | str) -> None:
    with CompletionsStandIn(write, slow_seconds=1.5) as server:
        generator = asking(server)
        server.fault(fault, fault)
        assert [[rollout.text for rollout in row] for row in generator(PROBLEM, PREFIXES, 1)] == [["choice 0"]] * 3
        assert server.faults == []
        server.fault(*[fault] * 9)
        with pytest.raises(ConnectionError, match="failed 3 times"):
            generator(PROBLEM, PREFIXES, 1)


def test_a_prompt_that_is_refused_is_no_fault_of_the_server() -> None:
    with CompletionsStandIn(write, longest_prompt=40) as server:
        generator = asking(server)
        # The problem takes 27 characters of prompt, with one step 41.
        assert [len(row) for row in generator(PROBLEM, PREFIXES, 2)] == [2, 0, 0]
        with pytest.raises(ValueError, match="longer than 40"):
            generator(PROBLEM, PREFIXES[1:], 2)
        # A wrong key or model is, and ends it.
        server.models = ("another",)
        with pytest.raises(ConnectionError, match="HTTP 404"):
            generator(PROBLEM, PREFIXES, 2)


def test_what_is_wrong_with_the_server_is_said_at_once() -> None:
    with CompletionsStandIn(write, models=("a", "b")) as server:
        with pytest.raises(ValueError, match=r"models a, b; name one: --served-model"):
            asking(server)
        assert asking(server, served_model="b").served_model == "b"
        with pytest.raises(ValueError, match="404"):
            asking(server, served_model="c")
    with CompletionsStandIn(write, api_key="sk-1") as server, pytest.raises(ValueError, match="401"):
        asking(server)
