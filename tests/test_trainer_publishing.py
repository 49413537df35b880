"""What a trainer pushes: at every save and at the end, the files of `publish` and nothing of the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clean_process import CODE_FILES
from hub_client import ClientError, HubClient, shared_client
from hub_stand_in import HubStandIn
from small_training import LABELS, make_dataset, make_trainer

from hub_card import CardData, EvaluationResult
from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer.publishing import describe_training, hyperparameters, model_metrics

Folder = Callable[..., Path]
MODEL_FILES = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
FILES = CODE_FILES | MODEL_FILES | {"README.md", "evaluation_results.json"}


# ---- what it knows ---------------------------------------------------------------------------------


def test_hyperparameters_are_those_of_the_run(prm_folder: Folder, tmp_path: Path) -> None:
    options = {
        "learning_rate": 0.25,
        "head_learning_rate": 0.5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "seed": 7,
        "weight_decay": 0.125,
    }
    trainer, _ = make_trainer(prm_folder("llama"), tmp_path, **options)
    trainer.train()
    found = hyperparameters(trainer)
    expected = {
        **{name: options[name] for name in ("learning_rate", "head_learning_rate", "weight_decay", "seed")},
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "batch_size": 6,
        "optimizer_steps": 2,
        "precision": "float32",
        "freeze_backbone": False,
        "training_records": len(LABELS),
        "training_steps_labelled": sum(label != -100.0 for row in LABELS for label in row),
    }
    assert {name: found[name] for name in expected} == expected
    # The helper keeps soft labels; every other option of loss and labels is at its default.
    assert found["soft_labels"] == "keep"
    assert not found.keys() & {"ranking", "pos_weight", "normalization", "after_first_error", "num_labels"}
    assert found["epochs"] == pytest.approx(2 / 2)  # 8 records in batches of 6 are two optimizer steps
    json.dumps(found)


def test_hyperparameters_name_the_options_of_the_loss(prm_folder: Folder, tmp_path: Path) -> None:
    options = {"ranking_loss": "pqm", "pos_weight": 2.0, "loss_normalization": "solution", "after_first_error": "mask"}
    trainer, _ = make_trainer(prm_folder("llama"), tmp_path, **options)
    found = hyperparameters(trainer)
    names = ("ranking", "pos_weight", "normalization", "after_first_error")
    assert [found[name] for name in names] == ["pqm", 2.0, "solution", "mask"]


def test_what_the_author_says_stays(prm_folder: Folder, tmp_path: Path) -> None:
    trainer, _ = make_trainer(prm_folder("llama"), tmp_path, eval_dataset=make_dataset(), learning_rate=0.25)
    mine = EvaluationResult(dataset="mine", metrics={"roc_auc": 0.5})
    trainer.card = CardData(title="T", training={"learning_rate": "my own", "hours": 3}, results=(mine,))
    metrics = trainer.evaluate()
    card = describe_training(trainer)
    assert (card.title, card.training["learning_rate"], card.training["hours"]) == ("T", "my own", 3)
    assert card.training["optimizer_steps"] == 0
    first, second = card.results
    assert first == mine
    assert (second.dataset, second.note) == ("held-out problems", "Measured at optimizer step 0.")
    assert second.metrics["loss"] == metrics["eval_loss"]
    assert second.metrics["brier"] == metrics["eval_brier"]
    assert not [name for name in second.metrics if "runtime" in name or "second" in name or name.startswith("eval")]


@pytest.mark.parametrize("name", ["org/backbone", "name", "/home/someone/backbone", "models/backbone", ""])
def test_the_backbone_is_named_where_it_is_no_folder_here(
    prm_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "backbone").mkdir(parents=True)
    trainer, _ = make_trainer(prm_folder("llama"), tmp_path / "run")
    trainer.model.config.text_config.name_or_path = name
    assert describe_training(trainer).base_model == (name if name in ("org/backbone", "name") else None)
    trainer.card = CardData(base_model="org/said")
    assert describe_training(trainer).base_model == "org/said"


def test_every_evaluation_set_has_its_results(prm_folder: Folder, tmp_path: Path) -> None:
    sets = {"sums": make_dataset(LABELS[:2]), "words": make_dataset(LABELS[4:])}
    trainer, _ = make_trainer(prm_folder("llama"), tmp_path, eval_dataset=sets)
    metrics = trainer.evaluate()
    losses = {result.dataset: result.metrics["loss"] for result in describe_training(trainer).results}
    assert losses == {"sums": metrics["eval_sums_loss"], "words": metrics["eval_words_loss"]}


def test_results_are_those_of_the_model_that_is_kept(prm_folder: Folder, tmp_path: Path) -> None:
    """With the worst loss called best, the model of the first step is loaded at the end of three."""
    trainer, _ = make_trainer(
        prm_folder("llama"),
        tmp_path,
        eval_dataset=make_dataset(),
        max_steps=3,
        learning_rate=0.01,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert losses[1] > losses[3]
    (result,) = describe_training(trainer).results
    assert (result.metrics["loss"], result.note) == (losses[1], "Measured at optimizer step 1.")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1], abs=1e-6)


def test_metrics_of_a_model_are_told_from_those_of_the_run() -> None:
    metrics = {"eval_loss": 1, "eval_roc_auc": 0.5, "eval_runtime": 2.0, "eval_steps_per_second": 3.0, "epoch": 1.0}
    assert model_metrics(metrics, "eval") == {"loss": 1.0, "roc_auc": 0.5}


# ---- what it pushes --------------------------------------------------------------------------------

TRAIN = """
from pathlib import Path
from small_training import make_dataset, make_trainer
from trainer.adapters import AdapterArguments, add_adapters
from trainer.publishing import describe_training

def trainer_for(name, **options):
    defaults = {
        "push_to_hub": True, "hub_model_id": f"user/{name}", "hub_token": os.environ["HF_TOKEN"],
        "max_steps": 2, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "run_name": "secret run",
    }
    folder = Path(arguments["folder"]) / name
    return make_trainer(Path(arguments["prm"]), folder, eval_dataset=make_dataset(), **(defaults | options))[0]
"""


@pytest.fixture(scope="module")
def hub() -> HubStandIn:
    return shared_client()[0]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> HubClient:
    client = shared_client()[1]
    client.run(TRAIN, folder=str(tmp_path_factory.mktemp("trainers")))
    return client


@pytest.fixture(scope="module")
def trained(hub: HubStandIn, client: HubClient) -> Path:
    """A run that pushed at both of its saves and at its end, and then `publish` of its last checkpoint."""
    code = """
trainer = trainer_for("trained")
trainer.train()
publication = trainer.push_to_hub()
folder = Path(arguments["folder"]) / "trained"
checkpoint = PRMForStepScoring.from_pretrained(folder / "checkpoint-2")
publish(checkpoint, processor, "user/trained-by-hand", card=describe_training(trainer))
result = [str(folder), publication.commit]
"""
    folder, commit = client.run(code)
    assert hub.commits("user/trained")[1].sha == commit
    return Path(folder)


def test_every_save_and_the_end_are_pushed(hub: HubStandIn, trained: Path) -> None:
    messages = [commit.message for commit in hub.commits("user/trained")[::-1]]
    assert messages[0] == "initial commit"
    assert messages[1::2] == ["Training in progress, step 1", "Training in progress, step 2", "End of training"]
    assert all(message.startswith("Name the commit to pin: ") for message in messages[2::2])
    assert len(messages) == 7


def test_each_push_has_the_files_of_publish_and_no_others(hub: HubStandIn, trained: Path) -> None:
    # Here they are, and there they must not be.
    assert {"optimizer.pt", "training_args.bin"} <= {path.name for path in (trained / "checkpoint-2").iterdir()}
    assert "training_args.bin" in {path.name for path in trained.iterdir()}
    by_hand = hub.files("user/trained-by-hand")
    assert by_hand.keys() == FILES
    commits = hub.commits("user/trained")[:-1]
    for commit in commits:
        assert commit.tree.keys() == FILES
    for name in FILES - {"README.md"}:
        assert commits[0].tree[name].data == by_hand[name], name
    cards = [files["README.md"].decode() for files in (hub.files("user/trained"), by_hand)]
    pins = [hub.commits(repo)[1].sha for repo in ("user/trained", "user/trained-by-hand")]
    assert cards[0].replace(pins[0], "PIN") == (cards[1].replace(pins[1], "PIN").replace("trained-by-hand", "trained"))


def test_each_push_holds_the_weights_and_results_of_its_step(hub: HubStandIn, trained: Path) -> None:
    commits = hub.commits("user/trained")[::-1]
    for step, commit in ((1, commits[1]), (2, commits[3]), (2, commits[5])):
        weights = (trained / f"checkpoint-{step}" / "model.safetensors").read_bytes()
        assert commit.tree["model.safetensors"].data == weights
        (result,) = json.loads(commit.tree["evaluation_results.json"].data)
        assert result["note"] == f"Measured at optimizer step {step}."
        card = commit.tree["README.md"].data.decode()
        assert f"| optimizer\\_steps | {step} |" in card
    log = json.loads((trained / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert result["metrics"]["loss"] == pytest.approx(losses[-1])
    assert losses[0] != losses[1]


def test_nothing_private_is_in_any_push(hub: HubStandIn, client: HubClient, trained: Path) -> None:
    needles = [hub.token, str(trained), str(trained.parent), str(client.prm), "secret run"]
    for commit in hub.commits("user/trained"):
        for name, blob in commit.tree.items():
            assert not [needle for needle in needles if needle.encode() in blob.data], name


def test_only_the_end_is_pushed_where_that_is_asked_for(hub: HubStandIn, client: HubClient) -> None:
    code = """
trainer = trainer_for("at-end", hub_strategy="end", hub_revision="trained", hub_private_repo=True)
trainer.train()
trainer.push_to_hub("Done")
"""
    client.run(code)
    assert hub.is_private("user/at-end")
    assert [commit.message for commit in hub.commits("user/at-end", "trained")][1:] == ["Done", "initial commit"]
    assert hub.files("user/at-end", "trained").keys() == FILES
    assert hub.files("user/at-end") == {}


def test_a_trainer_that_was_not_asked_to_push_can(hub: HubStandIn, client: HubClient) -> None:
    code = """
trainer = trainer_for("asked-later", push_to_hub=False, hub_model_id=None, hub_token=None, eval_strategy="no")
trainer.train()
trainer.push_to_hub(revision="dev", private=True, token=arguments["token"])
"""
    client.run(code, token=hub.token)
    assert hub.is_private("user/asked-later")
    assert hub.files("user/asked-later", "dev").keys() == FILES - {"evaluation_results.json"}
    with pytest.raises(ClientError, match=r"blocking=False would go on before the published model is checked"):
        client.run("trainer.push_to_hub(blocking=False)")


def test_saving_a_model_by_hand_pushes_it_too(hub: HubStandIn, client: HubClient) -> None:
    """As `Trainer.save_model` does with `push_to_hub`."""
    client.run("trainer_for('saved', save_strategy='no').save_model()")
    assert hub.commits("user/saved")[1].message == "Model save"
    assert hub.files("user/saved").keys() == FILES - {"evaluation_results.json"}


@pytest.mark.parametrize("fault", ["hub", "card"])
def test_a_push_that_fails_while_training_stops_nothing(hub: HubStandIn, client: HubClient, fault: str) -> None:
    name = f"unlucky-{fault}"
    code = f"""
trainer = trainer_for("{name}")
if "{fault}" == "card":
    trainer.card = CardData(pictures=(hub_card.card.Picture(path="nowhere.png", caption=""),))
trainer.train()
trainer.card = CardData()
trainer.push_to_hub()
result = trainer.state.global_step
"""
    if fault == "hub":
        hub.fail("commit", 500, path=f"/user/{name}/")
    before = len(client.log())
    assert client.run(code) == 2
    assert hub.unused_faults == []
    warning = client.log()[before:]
    assert "WARNING:trainer.saving_trainer:the push at step 1 failed, training goes on: " in warning
    assert ("the Hub refused user/unlucky-hub (500)" if fault == "hub" else "got nowhere.png") in warning
    assert hub.token not in client.log()
    messages = [commit.message for commit in hub.commits(f"user/{name}")][1::2]
    expected = ["End of training", "Training in progress, step 2"][: 2 if fault == "hub" else 1]
    assert messages[: len(expected)] == expected
    assert hub.files(f"user/{name}").keys() == FILES


def test_what_should_be_private_is_not_pushed_to_a_public_repository(hub: HubStandIn, client: HubClient) -> None:
    code = """
huggingface_hub.create_repo("user/open")
trainer_for("open", hub_private_repo=True).train()
"""
    before = len(client.log())
    client.run(code)
    assert client.log()[before:].count("user/open is public, and private=True makes only a new repository") == 2
    assert hub.files("user/open") == {}


def test_a_failed_push_at_the_end_is_an_error(hub: HubStandIn, client: HubClient) -> None:
    client.run("trainer = trainer_for('late', save_strategy='no', hub_strategy='end')\ntrainer.train()")
    hub.fail("commit", 500, path="/user/late/")
    with pytest.raises(ClientError, match=r"the Hub refused user/late \(500\)") as raised:
        client.run("trainer.push_to_hub()")
    assert hub.token not in raised.value.trace
    assert hub.files("user/late") == {}
    client.run("trainer.push_to_hub()")
    assert hub.files("user/late").keys() == FILES


def test_adapters_are_pushed_merged(hub: HubStandIn, client: HubClient, tmp_path: Path) -> None:
    code = """
plain = trainer_for("adapted")
from trainer.prm_trainer import PRMTrainer
adapted = add_adapters(plain.model, AdapterArguments(lora_r=2))
sets = {"train_dataset": make_dataset(), "eval_dataset": make_dataset()}
trainer = PRMTrainer(adapted, plain.args, processing_class=processor, **sets)
trainer.train()
state = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
trainer.push_to_hub()
after = dict(adapted.named_parameters())
batch = processor(["What is 2 + 2?"], [["2 + 2 = 4.", "So 4."]], return_tensors="pt")
with torch.no_grad():
    logits = adapted.eval()(**batch).logits.flatten().tolist()
same = state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)
result = {"logits": logits, "unchanged": same, "trained": [name for name in state if "lora_A" in name][:1]}
"""
    found = client.run(code)
    assert (found["unchanged"], len(found["trained"])) == (True, 1)
    commits = hub.commits("user/adapted")
    assert [commit.message for commit in commits][1::2] == [
        "End of training",
        "Training in progress, step 2",
        "Training in progress, step 1",
    ]
    for commit in commits[:-1]:
        assert commit.tree.keys() == FILES
    last = [commit.tree["model.safetensors"].data for commit in commits[:-1]]
    assert last[0] == last[2] != last[4]
    for name, data in hub.files("user/adapted").items():
        (tmp_path / name).write_bytes(data)
    model, processor = PRMForStepScoring.from_pretrained(tmp_path), PRMProcessor.from_pretrained(tmp_path)
    batch = processor(["What is 2 + 2?"], [["2 + 2 = 4.", "So 4."]], return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits.flatten().tolist()
    assert logits == pytest.approx(found["logits"], abs=1e-5)
