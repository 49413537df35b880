"""`publish` against a Hub on localhost: what it sends, what loads from there, and what is left when a push fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clean_process import CODE_FILES, PROJECT, fingerprint, run_clean
from hub_client import ClientError, HubClient, shared_client
from hub_stand_in import HubStandIn

from modeling_prm import PRMForStepScoring, PRMProcessor

REPO, PRIVATE = "user/published", "user/secret"
MODEL_FILES = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
BARE = CODE_FILES | MODEL_FILES | {"README.md"}
PUSH = "result = publish(model(arguments.get('scale', 1.0)), processor, arguments['repo']).commit"


@pytest.fixture(scope="module")
def hub() -> HubStandIn:
    return shared_client()[0]


@pytest.fixture(scope="module")
def client() -> HubClient:
    return shared_client()[1]


@pytest.fixture(scope="module")
def published(hub: HubStandIn, client: HubClient, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `publish` returned for a whole PRM, with everything that a card can have, checked in a clean process."""
    picture = tmp_path_factory.mktemp("pictures") / "calibration of it.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\nsome picture")
    code = """
card = CardData(
    license="apache-2.0",
    results=(EvaluationResult(dataset="sums", metrics={"roc_auc": 0.75, "loss": float("nan")}),),
    pictures=(hub_card.card.Picture(path=arguments["picture"], caption="Calibration"),),
)
with clean_check():
    result = dataclasses.asdict(publish(model(), processor, arguments["repo"], card=card))
publish(model(2.0), processor, arguments["repo"], card=card, revision="dev")
publish(model(3.0), processor, arguments["private"], private=True)
"""
    return client.run(code, repo=REPO, private=PRIVATE, picture=str(picture))


def scores(client: HubClient, scale: float = 1.0) -> dict[str, Any]:
    """What the PRM in memory gives, with its head's weights multiplied."""
    model = PRMForStepScoring.from_pretrained(client.prm)
    model.value_head.out.weight.data.mul_(scale)
    return fingerprint(model, PRMProcessor.from_pretrained(client.prm))


# ---- what is sent -------------------------------------------------------------------------------------


def test_the_repository_is_whole_and_nothing_else_is_in_it(hub: HubStandIn, published: dict[str, Any]) -> None:
    files = hub.files(REPO)
    assert files.keys() == BARE | {"LICENSE", "evaluation_results.json", "pictures/1-calibration-of-it.png"}
    assert {name: len(data) for name, data in files.items()} == published["files"]
    assert files["README.md"].decode() == published["card"]
    assert files["LICENSE"] == (PROJECT / "LICENSE").read_bytes() == (PROJECT / "hub_card/apache-2.0.txt").read_bytes()
    assert files["pictures/1-calibration-of-it.png"] == b"\x89PNG\r\n\x1a\nsome picture"
    assert json.loads(files["evaluation_results.json"]) == [
        {
            "dataset": "sums",
            "dataset_id": None,
            "split": None,
            "note": "",
            "metrics": {"roc_auc": 0.75, "loss": None},
        }
    ]
    for name in CODE_FILES:
        assert files[name] == (PROJECT / "modeling_prm" / name).read_bytes(), name
    config = json.loads(files["config.json"])
    assert config["auto_map"]["AutoModel"] == "modeling_prm.PRMForStepScoring"
    assert config["custom_pipelines"]["step-scoring"]["impl"] == "pipeline_prm.StepScoringPipeline"


def test_one_commit_brings_the_model_and_a_second_names_it(hub: HubStandIn, published: dict[str, Any]) -> None:
    last, first, empty = hub.commits(REPO)
    assert (published["commit"], empty.tree) == (first.sha, {})
    assert published["url"] == f"{hub.url}/{REPO}/tree/{first.sha}"
    assert (first.message, last.message) == ("Upload process reward model", f"Name the commit to pin: {first.sha}")
    assert {name for name in last.tree if last.tree[name].data != first.tree[name].data} == {"README.md"}
    cards = [commit.tree["README.md"].data.decode() for commit in (last, first)]
    assert cards[0].count(first.sha) == 3  # two snippets and the advice to pin
    assert first.sha not in cards[1]
    assert 'source, revision = "user/published", "main"' in cards[1]


def test_a_branch_leaves_the_main_one_alone(hub: HubStandIn, published: dict[str, Any]) -> None:
    assert hub.branches(REPO).keys() == {"main", "dev"}
    assert len(hub.commits(REPO)) == 3
    _, first = hub.commits(REPO, "dev")[:2]
    card = first.tree["README.md"].data.decode()
    assert 'source, revision = "user/published", "dev"' in card
    assert 'revision="dev", trust_remote_code=True' in card
    assert '"main"' not in card
    assert first.tree["model.safetensors"].data != hub.read(REPO, "model.safetensors")


def test_nothing_of_this_machine_is_sent(hub: HubStandIn, client: HubClient, published: dict[str, Any]) -> None:
    needles = [str(client.prm.parent), str(PROJECT), str(Path.home()), hub.token]
    for repo in (REPO, PRIVATE):
        for commit in hub.commits(repo) + (hub.commits(repo, "dev") if repo == REPO else []):
            for name, blob in commit.tree.items():
                assert not [needle for needle in needles if needle.encode() in blob.data], name


LOAD = """
from transformers import AutoModel, AutoProcessor

def load(repo, **options):
    parts = [auto.from_pretrained(repo, trust_remote_code=True, **options) for auto in (AutoModel, AutoProcessor)]
    assert {type(part).__module__.split(".")[0] for part in parts} == {"transformers_modules"}
    return fingerprint(*parts)

def load_all(repo, commit, private):
    result = {"main": load(repo), "dev": load(repo, revision="dev"), "commit": load(repo, revision=commit)}
    return result | {"private": load(private)}

result = load_all(*arguments["which"])
"""
REFUSED = """
from huggingface_hub import snapshot_download
for name, token in arguments["tokens"].items():
    try:
        load(arguments["which"][2], token=token, cache_dir="empty")
        result[name] = "loaded"
    except OSError as error:
        result[name] = str(error)
"""


def test_it_loads_from_the_hub_and_again_offline(
    hub: HubStandIn, client: HubClient, published: dict[str, Any], tmp_path: Path
) -> None:
    """By the newest commit, by branch, by hash, from a private repository; then from the cache alone."""
    environment = hub.environment(tmp_path / "hf_home")
    which = [REPO, published["commit"], PRIVATE]
    tokens = {"none": False, "stranger": hub.stranger_token, "wrong": "hf_wrong"}
    online = run_clean(
        LOAD + REFUSED,
        folder=tmp_path / "online",
        arguments={"which": which, "tokens": tokens},
        environment=environment,
    )
    expected = {"main": 1.0, "commit": 1.0, "dev": 2.0, "private": 3.0}
    for name, scale in expected.items():
        assert online[name] == scores(client, scale), name
    for name in tokens:
        assert online[name] != "loaded", name
        assert not [secret for secret in (hub.token, *tokens.values()) if secret and secret in online[name]]
    number = len(hub.requests)
    offline = run_clean(
        LOAD,
        folder=tmp_path / "offline",
        arguments={"which": which},
        environment={**environment, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"},
    )
    assert offline == {name: online[name] for name in expected}
    assert len(hub.requests) == number


def test_what_an_earlier_push_left_is_taken_away(hub: HubStandIn, client: HubClient) -> None:
    """An adapter left there would make loading take another model; people's own files stay."""
    repo = "user/stale"
    client.run("huggingface_hub.create_repo(arguments['repo'])", repo=repo)
    left = (
        *("adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "old_prm.py"),
        *("model.safetensors.index.json", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"),
        *("runs/Nov01_machine/events.out.tfevents.1.machine", "trainer_state.json", "pictures/1-old.png", "LICENSE"),
        *("chat_template.jinja", "vocab.json", "merges.txt", "evaluation_results.json", "config.4.0.0.json"),
    )
    kept = dict.fromkeys(("notes.md", ".gitattributes", "data/examples.json", "model.gguf"), b"mine")
    hub.commit(repo, dict.fromkeys(left, b"{}") | kept)
    client.run(PUSH, repo=repo)
    assert hub.files(repo).keys() == BARE | kept.keys()
    assert {name: hub.read(repo, name) for name in kept} == kept


def test_a_client_with_xet_commits_once_too(hub: HubStandIn, client: HubClient) -> None:
    """There `upload_folder` sends a folder in several commits, and a push that fails leaves some of them."""
    code = "with replaced(huggingface_hub.hf_api, 'is_xet_available', lambda: True):\n    "
    commit = client.run(code + PUSH, repo="user/xet")
    assert [c.sha for c in hub.commits("user/xet")][1] == commit
    assert len(hub.commits("user/xet")) == 3
    check_complete(hub, "user/xet", commit)


def test_publishing_the_same_again_is_no_new_model(hub: HubStandIn, client: HubClient) -> None:
    first, second = (client.run(PUSH, repo="user/twice") for _ in range(2))
    trees = [{name: blob.data for name, blob in c.tree.items()} for c in hub.commits("user/twice")[:-1]]
    assert len({tree["model.safetensors"] for tree in trees}) == 1
    assert f'"{second}"' in hub.read("user/twice", "README.md").decode()
    assert first != second


# ---- what must not happen --------------------------------------------------------------------------


def test_a_dry_run_asks_the_hub_nothing(hub: HubStandIn, client: HubClient) -> None:
    number = len(hub.requests)
    code = "result = dataclasses.asdict(publish(model(), processor, 'user/dry', private=True, dry_run=True))"
    found = client.run(code)
    assert len(hub.requests) == number
    assert found["files"].keys() == BARE
    assert (found["commit"], found["url"]) == (None, None)
    assert found["card"].startswith("---\n")
    assert "user/dry" not in hub.repositories


def test_private_is_not_given_up_without_a_word(hub: HubStandIn, client: HubClient) -> None:
    assert hub.is_private(PRIVATE)
    client.run(PUSH, repo="user/public")
    before = hub.commits("user/public")
    with pytest.raises(ClientError, match="user/public is public, and private=True makes only a new") as raised:
        client.run("publish(model(2.0), processor, 'user/public', private=True)")
    assert "ValueError" in raised.value.kinds
    assert hub.commits("user/public") == before
    assert not hub.is_private("user/public")


@pytest.mark.parametrize("repo", ["name", "a/b/c", "user/", "user/a b", "user/../x", "user/a--b", "https://x/y"])
def test_a_name_that_is_none_is_refused_before_any_work(client: HubClient, repo: str) -> None:
    with pytest.raises(ClientError) as raised:
        client.run("publish(None, None, arguments['repo'])", repo=repo)
    assert "ValueError" in raised.value.kinds


# The fault and its arguments, further arguments of `publish`, and what the error must say.
FAULTS: dict[str, tuple[tuple[str, dict[str, Any]] | None, str, str]] = {
    "error on commit": (("fail", {"kind": "commit", "status": 500}), "", "(500): the repository is at its last good"),
    "refused commit": (("fail", {"kind": "commit", "status": 400}), "", "(400): it does not take what was sent"),
    "error on upload": (("fail", {"kind": "lfs_batch", "status": 503, "times": 6}), "", "(503)"),
    "error on info": (("fail", {"kind": "info", "status": 404}), "", "(404): there is no such repository for this"),
    "cut upload": (("cut_upload", {"after": 50_000, "times": 6}), "", "broke off; the repository is at its last good"),
    "cut commit": (("cut_upload", {"kind": "commit", "after": 1000}), "", "broke off; the repository is at its last"),
    "wrong token": (None, "token='hf_wrong'", "(401): log in with `hf auth login`"),
    "reading token": (None, "token='hf_stand_in_read'", "(403): the token may not write there"),
    "stranger": (None, "token='hf_stand_in_stranger'", "(403): the token may not write there"),
    "no token": (None, "token=False", "(401): log in with"),
    "unreachable": (None, "", "broke off"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_push_leaves_all_as_it_was_and_a_retry_completes_it(
    hub: HubStandIn, client: HubClient, name: str, tmp_path: Path
) -> None:
    fault, options, message = FAULTS[name]
    repo = f"user/{name.replace(' ', '-')}"
    client.run(PUSH, repo=repo, scale=1.0)
    before, local = hub.commits(repo), read_all(client.prm)
    if fault is not None:
        getattr(hub, fault[0])(**fault[1], path=f"/{repo}/")
    address = "http://127.0.0.1:9" if name == "unreachable" else hub.url
    with pytest.raises(ClientError) as raised:
        client.run(
            "with replaced(huggingface_hub.constants, 'ENDPOINT', arguments['address']):\n"
            f"    publish(model(2.0), processor, arguments['repo'], {options})",
            address=address,
            repo=repo,
        )
    said = f"{raised.value} {raised.value.trace}"
    assert message in said
    assert "OSError" in raised.value.kinds
    assert not [token for token in (hub.token, hub.read_token, hub.stranger_token, "hf_wrong") if token in said]
    assert hub.unused_faults == []
    assert hub.commits(repo) == before
    assert read_all(client.prm) == local
    retried = client.run(PUSH, repo=repo, scale=2.0)
    check_complete(hub, repo, retried)
    assert hub.read(repo, "model.safetensors") != before[0].tree["model.safetensors"].data


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_complete(hub: HubStandIn, repo: str, commit: str) -> None:
    """The newest commit is the whole model with a card that names the commit with that model."""
    assert hub.files(repo).keys() == BARE
    assert f'revision="{commit}"' in hub.read(repo, "README.md").decode()
    assert hub.files(repo, commit).keys() == BARE
    assert hub.read(repo, "model.safetensors") == hub.read(repo, "model.safetensors", commit)


def test_one_upload_cut_in_the_middle_is_repeated(hub: HubStandIn, client: HubClient) -> None:
    hub.cut_upload(after=50_000, path="/user/cut-once/")
    check_complete(hub, "user/cut-once", client.run(PUSH, repo="user/cut-once"))
    assert hub.unused_faults == []


def test_a_push_of_another_in_between_is_not_mixed_with_ours(hub: HubStandIn, client: HubClient) -> None:
    repo = "user/contended"
    client.run(PUSH, repo=repo, scale=1.0)
    hub.commit_between(repo, {"modeling_prm.py": b"theirs"})
    with pytest.raises(ClientError, match=r"\(412\): somebody else pushed there meanwhile"):
        client.run(PUSH, repo=repo, scale=2.0)
    assert hub.commits(repo)[0].message == "by another client"
    assert hub.read(repo, "modeling_prm.py") == b"theirs"
    check_complete(hub, repo, client.run(PUSH, repo=repo, scale=2.0))


@pytest.mark.parametrize("how", ["card", "answer"])
def test_a_push_that_breaks_after_the_model_is_there_is_completed_by_a_retry(
    hub: HubStandIn, client: HubClient, how: str
) -> None:
    """Without its second commit the repository holds the model and a card that names the branch."""
    repo = f"user/half-{how}"
    code = "publish(model(), processor, arguments['repo'])"
    if how == "card":
        lines = ("def fail(*arguments, **options):", "    raise ConnectionError('gone')", "")
        code = "\n".join(lines) + f"with replaced(hub_card.publishing, '_push_card', fail):\n    {code}"
    else:
        hub.lose_answer("commit", path=f"/{repo}/")
    with pytest.raises(ClientError, match="broke off; the repository is at its last good commit"):
        client.run(code, repo=repo)
    assert hub.files(repo).keys() == BARE
    assert [commit.message for commit in hub.commits(repo)] == ["Upload process reward model", "initial commit"]
    check_complete(hub, repo, client.run(PUSH, repo=repo))


def test_a_refusal_that_repeats_the_token_is_shown_without_it(client: HubClient) -> None:
    """The client's error for status 400 is a ValueError too, which passes unchanged where it is of an argument."""
    code = """
import types
from huggingface_hub.errors import BadRequestError

def refuse(*arguments, **options):
    answer = types.SimpleNamespace(status_code=400, headers={}, request=None)
    raise BadRequestError("bad header: Bearer hf_given", response=answer)

with replaced(huggingface_hub.HfApi, "create_repo", refuse):
    publish(model(), processor, "user/echo", token="hf_given")
"""
    with pytest.raises(
        ClientError, match=r"the Hub refused user/echo \(400\): .*bad header: Bearer \[token\]"
    ) as raised:
        client.run(code)
    assert "hf_given" not in raised.value.trace


def test_a_card_that_holds_the_token_is_not_sent(hub: HubStandIn, client: HubClient) -> None:
    number = len(hub.requests)
    for token in ("HF_TOKEN", "hf_another_one"):
        code = """
secret = os.environ.get(arguments["token"], arguments["token"])
publish(model(), processor, "user/leak", card=CardData(description=f"I use {secret}."), token=secret, force=True)
"""
        with pytest.raises(ClientError, match=r"README.md would publish the Hub token; take it out") as raised:
            client.run(code, token=token)
        assert hub.token not in str(raised.value)
        assert "hf_another_one" not in str(raised.value)
    assert len(hub.requests) == number


# ---- the check before the push ---------------------------------------------------------------------


def test_saved_weights_that_score_otherwise_stop_the_push(hub: HubStandIn, client: HubClient) -> None:
    code = """
def save(self, folder, *arguments, **options):
    "As when a checkpoint loses a change on its way."
    with torch.no_grad():
        self.value_head.out.bias.add_(0.5)
        whole_save(self, folder, *arguments, **options)
        self.value_head.out.bias.sub_(0.5)

whole_save = PRMForStepScoring.save_pretrained
with clean_check(), replaced(PRMForStepScoring, "save_pretrained", save):
    publish(model(), processor, "user/broken", force=True)
"""
    number = len(hub.requests)
    with pytest.raises(ClientError, match=r"logits differ by up to 0.5, and at most 0.001 is rounding in float32") as e:
        client.run(code)
    assert "CheckpointError" in e.value.kinds
    assert "in memory [" in str(e.value)
    assert len(hub.requests) == number
    assert "user/broken" not in hub.repositories


def test_weights_that_are_not_finite_pass_with_force_alone(hub: HubStandIn, client: HubClient) -> None:
    code = """
broken = model()
with torch.no_grad():
    broken.value_head.out.bias.fill_(float("nan"))
with clean_check():
    result = publish(broken, processor, "user/nan", force=arguments["force"]).commit
"""
    with pytest.raises(ClientError, match=r"value_head.out.bias holds NaN or infinite values, so the model scores"):
        client.run(code, force=False)
    assert "user/nan" not in hub.repositories
    check_complete(hub, "user/nan", client.run(code, force=True))


def test_adapters_are_merged_into_a_copy(hub: HubStandIn, client: HubClient, tmp_path: Path) -> None:
    code = """
import peft

def logits(model):
    batch = processor(["What is 2 + 2?"], [["2 + 2 = 4.", "So 4."]], return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits.flatten().tolist()

bare = model()
options = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["value_head"], "init_lora_weights": False}
tokens = {"embed_tokens": [bare.config.separator_token_id]}
adapted = peft.get_peft_model(bare, peft.LoraConfig(**options, trainable_token_indices=tokens)).train()
with torch.no_grad():
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
state = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
modes = [module.training for module in adapted.modules()]
publish(adapted, processor, "user/merged")
after = dict(adapted.named_parameters())
same = state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)
same &= [module.training for module in adapted.modules()] == modes
result = {"adapted": logits(adapted.eval()), "bare": logits(model()), "unchanged": same}
"""
    found = client.run(code)
    assert found["unchanged"]
    assert hub.files("user/merged").keys() == BARE
    for name, data in hub.files("user/merged").items():
        (tmp_path / name).write_bytes(data)
    model, processor = PRMForStepScoring.from_pretrained(tmp_path), PRMProcessor.from_pretrained(tmp_path)
    logits = model(**processor(["What is 2 + 2?"], [["2 + 2 = 4.", "So 4."]], return_tensors="pt")).logits
    assert logits.flatten().tolist() == pytest.approx(found["adapted"], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(found["adapted"], found["bare"], strict=True)) > 0.05


def test_adapters_that_cannot_be_merged_and_other_models_are_refused(client: HubClient) -> None:
    code = """
import peft
inside = model()
inside.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
publish(inside, processor, "user/inside")
"""
    with pytest.raises(ClientError, match=r"put them in with peft.get_peft_model\(model, ...\) instead"):
        client.run(code)
    with pytest.raises(ClientError, match="a PRMForStepScoring is needed, got Linear"):
        client.run("publish(torch.nn.Linear(2, 2), processor, 'user/other')")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("card=CardData(pictures=(hub_card.card.Picture(path='x.png', caption=''),))", "must be a PNG file, got x.png"),
        ("license_file='nowhere.txt'", "the licence file nowhere.txt is not there"),
    ],
)
def test_files_that_are_not_there_are_named(client: HubClient, options: str, message: str) -> None:
    with pytest.raises(ClientError, match=message):
        client.run(f"publish(model(), processor, 'user/nothing', {options})")


def test_a_licence_of_ones_own_is_sent(hub: HubStandIn, client: HubClient, tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("Be kind.")
    options = "card=CardData(license='other'), license_file=arguments['file']"
    client.run(f"publish(model(), processor, 'user/licensed', {options})", file=str(tmp_path / "terms.txt"))
    assert hub.read("user/licensed", "LICENSE") == b"Be kind."


def test_the_token_is_in_no_message(hub: HubStandIn, client: HubClient, published: dict[str, Any]) -> None:
    """After all of the above, with our loggers at DEBUG."""
    log = client.log()
    assert "INFO:hub_card.publishing:the saved model loads in a clean process" in log
    assert not [token for token in (hub.token, "hf_wrong", hub.read_token, hub.stranger_token) if token in log]
