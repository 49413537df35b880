"""Scores solutions with a PRM that a server holds, such as vLLM's, where it outgrows this machine:

    verifier = RemoteVerifier("http://127.0.0.1:8000", PRMProcessor.from_pretrained(folder))
    verifier.score_solution(problem, steps)

`python -m hub_card.convert` writes the checkpoint to serve. Texts become ids here, as for a `PRMVerifier`, so the
server needs no template; it answers `POST /pooling` with probabilities, a row a step or a row a token.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple

import torch

from .base_verifier import BaseVerifier, ScoredRows, StepStyle
from .configuration_prm import PRMConfig
from .http_client import JsonClient, ServerError, ServerRefusal, key_from_environment
from .pooling_answers import NotFiniteError, Rows, RowsError, read_models, read_probability, read_rows, rows_of_steps
from .processing_prm import EncodedSolution, PRMProcessor
from .scoring import check_processor

# The variable that gives vLLM's own server its key.
API_KEY_VARIABLE = "VLLM_API_KEY"

# Scored at the first use, to see what the server's rows are; and `fingerprint` tells models apart by it.
PROBE_PROBLEM = "Ann has 3 bags of 4 apples and eats 2. How many are left?"
PROBE_STEPS = ("3 * 4 = 12.", "She eats 2, so 12 - 2 = 9 are left.", "The answer is 9.")

# Refusals that concern one solution; others (401, 404, ...) concern all of them.
_OF_ONE_SOLUTION = frozenset({400, 413, 422})


class _Served(NamedTuple):
    """A model as the server names it, and how many tokens it takes, None where the server does not say."""

    name: str
    max_tokens: int | None


class RemoteVerifier(BaseVerifier):
    """Has the methods, results and errors of `PRMVerifier`; the forward passes are a server's.

    A list's solutions are asked for one a request, many at a time, and the server batches them: `batch_size` and
    `max_tokens_per_batch` change nothing here. What may pass (429, 5xx, connections refused or cut, timeouts,
    nonsense) is tried again with growing waits. Before the first solution the server is asked for its models, and a
    probe is scored; what is wrong with all solutions is raised there, with `on_error="record"` too. May be used from
    several threads, which nothing else that uses the processor may be.

    Args:
        url: of the server, such as `"http://127.0.0.1:8000"`.
        processor: the `PRMProcessor` of the checkpoint that is served, or was exported.
        aggregation: how step probabilities become one score, a method of `aggregate`; `"min"` by default.
        threshold: a step is called wrong where its probability is below this, 0.5 by default.
        model: the served model's name; needed where the server has several.
        api_key: sent as a bearer token, by default what the environment variable `VLLM_API_KEY` holds. Stands in
            no message, log or `repr`.
        concurrency: most requests under way at a time.
        timeout: seconds to connect, and to wait for an answer, before an attempt counts as failed.
        retries: attempts after the first.
        fingerprint: what `fingerprint(verifier)` gave for the model that should be served, to notice another.
        fingerprint_tolerance: by how much each of its probabilities may differ; bfloat16 moves them by about 0.01.

    Raises:
        TypeError: the processor, or another argument, is of the wrong type.
        ValueError: there is no such aggregation, the threshold is not in [0, 1], or another argument cannot be.

    The scoring methods raise what those of `PRMVerifier` do, and

        ServerError: (a ConnectionError) the server gives no usable answer, or serves something else.
        ServerRefusal: (a ValueError) it refuses all requests, for want of a key for instance.
    """

    _reader = "the server"

    def __init__(
        self,
        url: str,
        processor: Any,
        aggregation: str | None = None,
        *,
        threshold: float | None = None,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 32,
        timeout: float = 120.0,
        retries: int = 5,
        fingerprint: Sequence[float] | None = None,
        fingerprint_tolerance: float = 0.05,
    ) -> None:
        if not hasattr(processor, "separator_token_id") or not hasattr(processor, "encode"):
            raise TypeError(f"the PRMProcessor of the served PRM is needed, got {type(processor).__name__}")
        if model is not None and not isinstance(model, str):
            raise TypeError(f"model must be the name of a served model, got {type(model).__name__}")
        if fingerprint is not None and len(fingerprint) != len(PROBE_STEPS):
            raise ValueError(
                f"fingerprint must be the {len(PROBE_STEPS)} numbers that fingerprint(verifier) gives, "
                f"got {len(fingerprint)}"
            )
        super().__init__(
            processor,
            PRMConfig.aggregation if aggregation is None else aggregation,
            PRMConfig.error_threshold if threshold is None else threshold,
        )
        self.served_model = model
        self.fingerprint = None if fingerprint is None else tuple(fingerprint)
        self.fingerprint_tolerance = fingerprint_tolerance
        self._client = JsonClient(
            # Where clients of completions are pointed to, and the pooling is not.
            url.rstrip("/").removesuffix("/v1") if isinstance(url, str) else url,
            api_key=api_key or key_from_environment(API_KEY_VARIABLE),
            timeout=timeout,
            retries=retries,
            concurrency=concurrency,
        )
        self._served: _Served | None = None
        # One for the first use and for the tokenizer, which is needed there too.
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        url: str,
        checkpoint: str,
        aggregation: str | None = None,
        *,
        revision: str = "main",
        threshold: float | None = None,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 32,
        timeout: float = 120.0,
        retries: int = 5,
        fingerprint: Sequence[float] | None = None,
        fingerprint_tolerance: float = 0.05,
    ) -> RemoteVerifier:
        """One with the processor, aggregation and threshold of a checkpoint of ours, whose weights are not loaded.

        Args:
            checkpoint: the folder or Hub id of the PRM that was exported to the server.
            revision: of a PRM on the Hub.
            url and all others: as in the class.

        Raises:
            OSError, ValueError, TypeError: it cannot be loaded, or as the class says.
        """
        config = PRMConfig.from_pretrained(checkpoint, revision=revision)
        processor = PRMProcessor.from_pretrained(checkpoint, revision=revision)
        check_processor(SimpleNamespace(config=config), processor)
        return cls(
            url,
            processor,
            config.aggregation if aggregation is None else aggregation,
            threshold=config.error_threshold if threshold is None else threshold,
            model=model,
            api_key=api_key,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            fingerprint=fingerprint,
            fingerprint_tolerance=fingerprint_tolerance,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._client.base_url!r}, model={self.served_model!r})"

    def __enter__(self) -> RemoteVerifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the verifier cannot be used after it."""
        self._client.close()

    @property
    def max_positions(self) -> int | None:
        """How many tokens the server reads, None where it does not say; asks the server at the first use."""
        return self._connect().max_tokens

    def _encode(
        self, problems: list[Any], solutions: list[Any], step_style: StepStyle, first_idx: int, *, raises: bool
    ) -> tuple[list[list[str]], list[EncodedSolution | None], list[str | None]]:
        # Tokenizers refuse to be used from two threads at once.
        with self._lock:
            return super()._encode(problems, solutions, step_style, first_idx, raises=raises)

    def _encode_conversation(
        self, messages: Any, tools: Any, index: int, step_unit: str, truncation: str, on_error: str
    ) -> Any:
        with self._lock:
            return super()._encode_conversation(messages, tools, index, step_unit, truncation, on_error)

    def _score_encoded(
        self,
        encoded: list[EncodedSolution | None],
        first_idx: int,
        *,
        batch_size: int | None,
        max_tokens_per_batch: int | None,
    ) -> Generator[ScoredRows, None, None]:
        """A request for each solution, at most `concurrency` at a time; yields them as they come."""
        items = {row: item for row, item in enumerate(encoded) if item is not None}
        if not items:
            return
        served = self._connect()
        threads = min(self._client.concurrency, len(items))
        with ThreadPoolExecutor(threads, thread_name_prefix="remote-verifier") as pool:
            futures = {
                pool.submit(self._ask, item, served, f"solution {first_idx + row}"): row for row, item in items.items()
            }
            try:
                for future in as_completed(futures):
                    answer = future.result()
                    rows = [futures[future]]
                    if isinstance(answer, str):
                        yield ScoredRows(rows, None, answer)
                    else:
                        yield ScoredRows(rows, torch.tensor([answer], dtype=torch.float64))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, item: EncodedSolution, served: _Served, who: str) -> list[float] | str:
        """The step probabilities of one solution, or why it alone has none."""
        body = {"model": served.name, "input": item.input_ids, "use_activation": True}
        try:
            rows = self._client.post("/pooling", body, check=read_rows)
            return self._step_probs(rows, item)
        except NotFiniteError:
            return (
                f"the server gave NaN or infinite numbers for {who}; look for such values in the served weights, or "
                "serve them in another dtype (float16 overflows where bfloat16 and float32 do not)"
            )
        except ServerRefusal as error:
            if error.status in _OF_ONE_SOLUTION:
                return f"the server refuses {who}: {error}"
            raise
        except RowsError as error:
            raise ServerError(f"{self!r}: for {who}, {error}") from error

    def _step_probs(self, rows: Rows, item: EncodedSolution) -> list[float]:
        return [
            read_probability(row)
            for row in rows_of_steps(rows, item, self.processor.separator_token_id, self.processor.score_offset)
        ]

    def _connect(self) -> _Served:
        """The served model; at the first use the server is asked, and the probe scored."""
        with self._lock:
            if self._served is None:
                served = self._find_model(self._client.get("/v1/models", check=read_models))
                self._check_probe(served)
                self._served = served
            return self._served

    def _find_model(self, models: dict[str, int | None]) -> _Served:
        """The model to ask for.

        Raises:
            ServerError: it is not served, or none is named and there is not exactly one.
        """
        if self.served_model is None and len(models) == 1:
            return _Served(*next(iter(models.items())))
        if self.served_model in models:
            return _Served(self.served_model, models[self.served_model])
        names = ", ".join(map(repr, models)) or "none"
        wanted = "no model is named" if self.served_model is None else f"there is no model {self.served_model!r}"
        raise ServerError(f"{wanted}, and {self._client.base_url} serves {names}; give one of them as model=...")

    def _check_probe(self, served: _Served) -> None:
        """Check that the server gives rows for the processor's ids, and that they are those of the fingerprint.

        Raises:
            ServerError: it serves something else.
            ServerRefusal: it refuses even the probe.
        """
        (item,) = self.processor.encode([PROBE_PROBLEM], [PROBE_STEPS], truncation="drop")
        if len(item.step_positions) < len(PROBE_STEPS):
            raise ValueError(f"max_length={self.processor.max_length} is too little for any solution; raise it")
        answer = self._ask(item, served, "the probe")
        if isinstance(answer, str):
            raise ServerError(
                f"{served.name!r} at {self._client.base_url} cannot score even a short probe, so it is not what this "
                f"processor belongs to, or does not pool a token: {answer}"
            )
        if self.fingerprint is None:
            return
        worst = max(abs(ours - theirs) for ours, theirs in zip(self.fingerprint, answer, strict=True))
        if worst > self.fingerprint_tolerance:
            shown = ["(" + ", ".join(f"{value:.4f}" for value in row) + ")" for row in (answer, self.fingerprint)]
            raise ServerError(
                f"{served.name!r} at {self._client.base_url} is another model: it gives the probe {shown[0]} in place "
                f"of {shown[1]}; serve the checkpoint that the fingerprint is of, or make the fingerprint anew"
            )


def fingerprint(verifier: Any) -> tuple[float, ...]:
    """A model's step probabilities of a fixed solution, by which a `RemoteVerifier` notices another model.

    Args:
        verifier: a `PRMVerifier` of the model, or a `RemoteVerifier` whose server is known to be right.
    """
    return tuple(verifier.score_solution(PROBE_PROBLEM, list(PROBE_STEPS)).step_probs)
