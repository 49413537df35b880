"""Where tokenized datasets are kept, so that the next run with the same data and layout need not tokenize again."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from pathlib import Path
from typing import Any

import datasets

from modeling_prm import PRMProcessor
from modeling_prm.configuration_prm import LAYOUT_OPTIONS

logger = logging.getLogger(__name__)

# Tokenizing fewer records takes no longer than looking for a file of them.
MIN_RECORDS = 1_000


def tokens_fingerprint(dataset: datasets.Dataset, processor: PRMProcessor, options: dict[str, Any], code: Any) -> str:
    """A name for what tokenizing gives, the same in every process and run.

    It holds the data, the processor's layout with its `max_length`, the tokenizer, the options, and the code, so
    that another release does not read what an older one wrote. `datasets` by itself hashes the pickled processor,
    which changes as its tokenizer is used.

    Args:
        dataset: what is tokenized.
        processor: what tokenizes.
        options: other options of tokenizing, by name.
        code: classes and functions; their whole files count.

    Returns:
        32 hexadecimal digits.
    """
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = {
        "data": dataset._fingerprint,
        "layout": {name: getattr(processor, name) for name in LAYOUT_OPTIONS},
        "separator": processor.separator_token_id,
        "tokenizer": [type(tokenizer).__name__, sorted(map(str, tokenizer.all_special_tokens))],
        "vocabulary": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "options": options,
        "code": [hashlib.sha256(Path(inspect.getfile(item)).read_bytes()).hexdigest() for item in code],
    }
    return hashlib.sha256(json.dumps(pieces, sort_keys=True).encode()).hexdigest()[:32]


def tokens_file(dataset: datasets.Dataset, fingerprint: str) -> str | None:
    """The file that keeps the tokens of a dataset in memory, or None where `datasets` chooses it or none is kept.

    It lies in the folder `modeling_prm` of the cache of `datasets` (`HF_DATASETS_CACHE`); none is kept of a few
    records, after `datasets.disable_caching()`, or where the folder cannot be made. A dataset from a file of the
    cache has its tokens beside it.
    """
    if dataset.cache_files or len(dataset) < MIN_RECORDS or not datasets.is_caching_enabled():
        return None
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "modeling_prm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.info("tokens are not kept for the next run: %s", error)
        return None
    return str(folder / f"{fingerprint}.arrow")
