"""Completions from a server with the OpenAI completions interface, such as vLLM's; see `labelling_rollouts`.

with JsonClient("http://127.0.0.1:8000/v1") as client:
    rollouts = ServerRollouts(client, tokenizer=AutoTokenizer.from_pretrained(name))
    rollouts("What is 2 + 3?", [(), ("2 + 3 = 5.",)], 4)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_prm import PRMConfig
from modeling_prm.http_client import JsonClient, ServerRefusal
from modeling_prm.step_generation import derive_seed, template_and_bos

from .labelling_rollouts import Rollout

# The prompt itself is refused with these; with others the address, the model's name or the key is wrong.
_REFUSES_PROMPT = frozenset({400, 413, 422})
_LARGEST_SEED = 2**31 - 1


class ServerRollouts:
    """Asks a server for completions: one request a prefix, for all its completions; several requests at a time.

    With a tokenizer the prompt is the problem in its chat template and goes out as ids, so that the server adds
    nothing to it; without one it is the text of `prompt_template`, and the server's own tokenizer adds what it does.
    Each request carries a seed that follows from `seed`, problem and prefix; whether the same seed gives the same
    completions is up to the server.

    Args:
        client: whose base URL ends before `/completions`, usually in `/v1`.
        served_model: the model's name there; by default the only one that the server has.
        tokenizer: the served model's.
        prompt_template: text before the steps, with `{problem}` once; by default the tokenizer's chat template, or
            `"Problem: {problem}\\n\\n"` without one.
        step_joiner, stop_strings, max_new_tokens, temperature, top_p, seed: as of `CausalLMRollouts`.

    Raises:
        ValueError: an option that cannot be, or the server has several models, or refuses to complete a first prompt.
        ConnectionError: the server gives no usable answer.
    """

    def __init__(
        self,
        client: JsonClient,
        *,
        served_model: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt_template: str | None = None,
        step_joiner: str = "\n\n",
        stop_strings: Sequence[str] = (),
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        if temperature <= 0:
            raise ValueError(
                f"temperature must be above 0, got {temperature}: all rollouts of a step would be the same"
            )
        self._bos: list[int] = []
        if tokenizer is not None:
            prompt_template, self._bos = template_and_bos(tokenizer, prompt_template)
        self.prompt_template = PRMConfig.problem_template if prompt_template is None else prompt_template
        if self.prompt_template.count("{problem}") != 1:
            raise ValueError(f"prompt_template must have {{problem}} exactly once, got {self.prompt_template!r}")
        self.client, self.tokenizer, self.step_joiner, self.seed = client, tokenizer, step_joiner, seed
        self._options: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        if stop_strings:
            self._options["stop"] = list(stop_strings)
        self.served_model = served_model or _only_model(client.get("/models", check=_model_names))
        # So that what is wrong with the server is not taken for what is wrong with a problem.
        self.client.post("/completions", self._body("1 + 1 =", (), 2) | {"max_tokens": 1}, check=_checked(2))

    def __call__(self, problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[Rollout]]:
        """As `RolloutGenerator`.

        Raises:
            ValueError: the server refuses every prompt, such as for its length.
            ConnectionError: the server gives no usable answer.
        """
        refusals: list[ServerRefusal] = []
        bodies = [self._body(problem, prefix, n) for prefix in prefixes]
        try:
            return self.client.post_all("/completions", bodies, check=_checked(n))
        except ServerRefusal as refusal:
            if refusal.status not in _REFUSES_PROMPT:
                raise ConnectionError(str(refusal)) from refusal
        # One of them is too long: the others are asked for alone.
        rollouts: list[list[Rollout]] = []
        for body in bodies:
            try:
                rollouts.append(self.client.post("/completions", body, check=_checked(n)))
            except ServerRefusal as refusal:
                if refusal.status not in _REFUSES_PROMPT:
                    raise ConnectionError(str(refusal)) from refusal
                refusals.append(refusal)
                rollouts.append([])
        if len(refusals) == len(prefixes):
            raise refusals[0]
        return rollouts

    def _body(self, problem: str, prefix: Sequence[str], n: int) -> dict[str, Any]:
        seed = derive_seed(self.seed, problem, [prefix], n) % _LARGEST_SEED
        prompt = self._prompt(problem, prefix)
        return {"model": self.served_model, "prompt": prompt, "n": n, "seed": seed, **self._options}

    def _prompt(self, problem: str, prefix: Sequence[str]) -> str | list[int]:
        before, after = self.prompt_template.split("{problem}")
        begun = "".join(step + self.step_joiner for step in prefix)
        if self.tokenizer is None:
            return before + problem + after + begun
        if not any(token in problem or token in begun for token in self.tokenizer.all_special_tokens):
            return self._bos + self._ids(before + problem + after + begun)
        # In the user's text special tokens are plain text.
        pieces = ((before, False), (problem, True), (after, False), (begun, True))
        return [*self._bos, *(token_id for text, plain in pieces for token_id in self._ids(text, plain=plain))]

    def _ids(self, text: str, *, plain: bool = False) -> list[int]:
        if self.tokenizer is None or not text:
            return []
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)["input_ids"]
        return list(ids)


def _model_names(answer: Any) -> list[str]:
    return [str(model["id"]) for model in answer["data"]]


def _only_model(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise ValueError(f"the server has the models {', '.join(names) or '(none)'}; name one: --served-model")
    return names[0]


class _checked:
    """Reads `n` completions out of an answer, in the order of their numbers."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, answer: Any) -> list[Rollout]:
        choices = sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
        if len(choices) != self.n:
            raise ValueError(f"{self.n} choices were asked for, and {len(choices)} came")
        tokens = (answer.get("usage") or {}).get("completion_tokens") or 0
        rollouts = []
        for index, choice in enumerate(choices):
            if not isinstance(choice["text"], str):
                raise TypeError(f"a choice's text must be a string, got {type(choice['text']).__name__}")
            # The server counts the tokens of all together.
            count = int(tokens) // self.n + (index < int(tokens) % self.n)
            rollouts.append(Rollout(choice["text"], count, choice.get("finish_reason") == "length"))
        return rollouts
