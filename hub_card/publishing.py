"""Publish a PRM: save it whole, check that it loads elsewhere, push it in one commit.

from hub_card import CardData, publish
publish(model, processor, "user/name", card=CardData(license="apache-2.0"))
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from modeling_prm.scoring import check_processor

from .card import CardData, render_card
from .checks import check_clean_load, check_nothing_private, check_weights
from .code_files import PICKLES, sha256
from .errors import without_token

logger = logging.getLogger(__name__)

RESULTS_FILE = "evaluation_results.json"
# What an earlier push may have left and this one does not bring: weights in other shards or of adapters, which
# loading would follow to another model, older code and tokenizers, and what Trainer's own pushes send along.
_STALE = (
    *("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "*.py", "pictures/*", "LICENSE"),
    *("config.*.json", "generation_config.json", "preprocessor_config.json", "chat_template.*", "tokenizer.*"),
    *("vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "trainer_state.json", "*tfevents*"),
    *(RESULTS_FILE, *(f"*{suffix}" for suffix in PICKLES)),
)
_LICENSE = Path(__file__).with_name("apache-2.0.txt")


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What was published, or would be.

    Args:
        repo_id: the repository.
        files: size in bytes of each file, by its path.
        card: the text of the card.
        commit: the hash of the commit that holds the model; None in a dry run.
        url: where to see it; None in a dry run.
    """

    repo_id: str
    files: dict[str, int]
    card: str
    commit: str | None = None
    url: str | None = None


def publish(
    model: Any,
    processor: Any,
    repo_id: str,
    *,
    card: CardData | None = None,
    license_file: str | Path | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload process reward model",
    force: bool = False,
    dry_run: bool = False,
) -> Publication:
    """Save a PRM with its code, processor, pipeline, card and results, check it, and push it.

    Before anything is sent, the saved files are loaded in a clean process with this package hidden, and
    their logits on a probe compared with those in memory. The push is one commit, so a failed one leaves the
    repository as it was; a second commit adds to the card the hash of the first, which is the one to pin.
    Nothing else is sent: no optimizer state, training arguments, token or local path; and what an earlier
    push left of weights, code and the like, the commit takes away.

    Args:
        model: a `PRMForStepScoring`, also wrapped in PEFT adapters, which are merged into a copy.
        processor: its processor.
        repo_id: `user/name`.
        card: what the author knows; the rest is read from the model.
        license_file: the text of the weights' licence, as LICENSE. For `license="apache-2.0"` it is at hand.
        private: whether to make a new repository private; by default as the account is set. With True, one that
            is there and public is refused.
        revision: the branch to push to, made where it is missing; by default `main`.
        token: as `huggingface_hub` takes it.
        commit_message: of the commit.
        force: publish weights that `check_weights` refuses, and words that look like a path or this machine's name.
        dry_run: do everything but push.

    Raises:
        TypeError, ValueError: an argument cannot be used.
        CheckpointError: what was saved does not load and score as in memory, holds something private, or
            its weights are not finite or not trained.
        OSError: the Hub refused, or cannot be reached; the message says what to do.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"the repository must be given as user/name, got {repo_id!r}")
    validate_repo_id(repo_id)
    model = plain_model(model)
    check_processor(model, processor)
    if not force:
        check_weights(model)
    with tempfile.TemporaryDirectory(prefix="modeling-prm-") as temporary:
        folder = Path(temporary)
        render = write_repository(
            model, processor, folder, card=card, repo_id=repo_id, branch=revision or "main", license_file=license_file
        )
        check_nothing_private(folder, token=token, only_token=force)
        difference = check_clean_load(model, processor, folder)
        logger.info("the saved model loads in a clean process; its logits differ from memory by %.1g", difference)
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        publication = Publication(repo_id=repo_id, files=files, card=render(None))
        if dry_run:
            return publication
        with _explained(repo_id, token):
            api = HfApi(token=token)
            commit = _push(api, repo_id, folder, private=private, revision=revision, message=commit_message)
            text = render(commit)
            _push_card(api, repo_id, text, revision=revision, commit=commit)
    files["README.md"] = len(text.encode())
    return dataclasses.replace(publication, card=text, commit=commit, url=f"{api.endpoint}/{repo_id}/tree/{commit}")


def plain_model(model: Any) -> Any:
    """The PRM inside compilation and adapters; adapters are merged into a copy of it.

    Raises:
        TypeError: there is no PRM inside.
    """
    model = getattr(model, "_orig_mod", model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError(
            "adapters of model.add_adapter(...) cannot be merged here; put them in with "
            "peft.get_peft_model(model, ...) instead"
        )
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    if not hasattr(model, "value_head"):
        raise TypeError(f"a PRMForStepScoring is needed, got {type(model).__name__}")
    return model


def write_repository(
    model: Any,
    processor: Any,
    folder: Path,
    *,
    card: CardData | None = None,
    repo_id: str,
    branch: str = "main",
    license_file: str | Path | None = None,
) -> Callable[[str | None], str]:
    """Write the files of a repository into an empty folder.

    Returns:
        A function from the commit to pin, or None, to the text of the card.

    Raises:
        ValueError: a picture or a licence file cannot be used.
    """
    card = card or CardData()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    pictures = {}
    for number, picture in enumerate(card.pictures, start=1):
        source = Path(picture.path)
        if source.suffix.lower() != ".png" or not source.is_file():
            raise ValueError(f"a picture of the card must be a PNG file, got {picture.path}")
        (folder / "pictures").mkdir(exist_ok=True)
        name = f"pictures/{number}-{re.sub(r'[^A-Za-z0-9_-]+', '-', source.stem)}.png"
        shutil.copyfile(source, folder / name)
        pictures[name] = picture.caption
    if card.results:
        results = [vars(result) | {"metrics": _json_numbers(result.metrics)} for result in card.results]
        (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _write_license(folder, card.license, license_file)
    code = {path.name: sha256(path) for path in sorted(folder.glob("*.py"))}

    def render(commit: str | None) -> str:
        return render_card(
            card, model, processor, repo_id=repo_id, code=code, pictures=pictures, branch=branch, commit=commit
        )

    (folder / "README.md").write_text(render(None), encoding="utf-8")
    return render


def _json_numbers(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON has them, which knows no NaN."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def _write_license(folder: Path, name: str | None, file: str | Path | None) -> None:
    if file is not None and not Path(file).is_file():
        raise ValueError(f"the licence file {file} is not there; give the path of its text")
    if file is not None or name == "apache-2.0":
        shutil.copyfile(file or _LICENSE, folder / "LICENSE")


def _push(api: HfApi, repo_id: str, folder: Path, *, private: bool | None, revision: str | None, message: str) -> str:
    """Send a folder in one commit, and return its hash."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.model_info(repo_id, revision=revision)
    if private and not before.private:
        raise ValueError(
            f"{repo_id} is public, and private=True makes only a new repository private; change it in its settings, or "
            "publish to another one"
        )
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    there = {sibling.rfilename for sibling in before.siblings or ()}
    stale = sorted(name for name in there - files.keys() if any(fnmatch(name, pattern) for pattern in _STALE))
    # Not `upload_folder`, which may send a folder in several commits. A push of another since `before` is refused,
    # so that files of both are never mixed.
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
        ],
        commit_message=message,
        revision=revision,
        parent_commit=before.sha,
    )
    return str(commit.oid)


def _push_card(api: HfApi, repo_id: str, text: str, *, revision: str | None, commit: str) -> None:
    api.upload_file(
        repo_id=repo_id,
        path_or_fileobj=text.encode(),
        path_in_repo="README.md",
        commit_message=f"Name the commit to pin: {commit}",
        revision=revision,
        parent_commit=commit,
    )


@contextmanager
def _explained(repo_id: str, token: str | bool | None) -> Iterator[None]:
    """Say what to do about an error of the Hub, without the token; nothing of it was half done there.

    What the connection raises is of the client's HTTP library, which is another one in each of its versions.
    """
    try:
        yield
    except HfHubHTTPError as error:  # first, since that of status 400 is a ValueError too
        status = error.response.status_code if error.response is not None else None
        advice = {
            400: "it does not take what was sent; change that, then publish again",
            401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
            403: "the token may not write there; use one that may, or another repository",
            404: "there is no such repository for this token; check the name and who may read it",
            412: "somebody else pushed there meanwhile; look at their commit, then publish again",
        }.get(status or 0, "the repository is at its last good commit; publish again")
        raise OSError(f"the Hub refused {repo_id} ({status}): {advice}; it said: {_said(error, token)}") from None
    except (ValueError, TypeError):
        raise
    except Exception as error:
        raise OSError(
            f"the push to {repo_id} broke off; the repository is at its last good commit and nothing here was lost: "
            f"publish again. It was: {_said(error, token)}"
        ) from None


def _said(error: BaseException, token: str | bool | None) -> str:
    return without_token(" ".join(str(error).split()), token)[:300]
