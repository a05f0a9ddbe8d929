"""The command line: what each command prints, writes and returns, and how it answers mistakes."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.utilities.seed import isolate_rng

import qlab
from qlab.cli import choice, main
from qlab.cli import training as cli_training
from qlab.experiments import EXPERIMENTS
from qlab.experiments.base import Experiment, Plan
from qlab.experiments.verdict import Difference, Metric, Rule
from qlab.registry import Entry

FIT = [
    "--method",
    "binary_connect",
    "--net.hidden",
    "[8]",
    "--data.subset",
    "300",
    "--trainer.enable_progress_bar",
    "false",
]
RUN = Path("runs/binary_connect-digits")


@pytest.fixture(autouse=True)
def _process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command owns its process: give the next test the folder, seeds, handlers and settings that it would find in a new one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets it; this puts it back
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setattr(sys, "argv", ["qlab"])  # LightningCLI warns of arguments beside its own
    handler = signal.getsignal(signal.SIGINT)
    deterministic = torch.are_deterministic_algorithms_enabled()
    with isolate_rng():
        yield
    torch.use_deterministic_algorithms(deterministic)
    signal.signal(signal.SIGINT, handler)


def weights(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state_dict"]


def same(a: Any, b: Any) -> bool:
    """Return whether two states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return (a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)) if isinstance(a, dict) else a == b


def reported(text: str) -> dict[str, str]:
    """Return the table that fit and test print."""
    rows = [line.strip().split("  ", 1) for line in text.splitlines() if line.startswith("  ")]
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


# ------------------------------------------------------------------------------------------------------ quick answers


def test_questions_and_mistyped_names_are_answered_without_torch() -> None:
    commands = [
        ["--help"],
        ["--version"],
        ["methods"],
        ["methods", "--json"],
        ["fit", "--help"],
        ["test", "--help"],
        ["reproduce", "--help"],
        ["reproduce", "--list"],
        ["bench", "--list"],
        ["describe", "nothing"],
        ["fit", "--method", "nothing"],
        ["fit", "--method", "adaste", "--data", "nothing"],
        ["fit", "--method", "adaste", "--net", "nothing"],
        ["reproduce", "nothing"],
    ]
    script = f"""
import sys
from qlab.cli import main
for command in {commands!r}:
    try:
        main(command)
    except SystemExit:
        pass
    assert not {{"torch", "pytorch_lightning", "pandas"}} & set(sys.modules), command
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_methods_json_keeps_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(qlab.CATALOG)
    for row in rows:
        assert list(row) == ["name", "title", "paper", "arxiv", "family", "weight_bits", "activation_bits"]


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(qlab.CATALOG)]] == list(qlab.CATALOG)


def test_no_command_shows_the_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "reproduce" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- describe


def test_describe_shows_a_methods_paper_and_every_hyperparameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "binary_connect"]) == 0
    page = capsys.readouterr().out
    assert "1511.00363" in page
    for parameter in qlab.methods.hyperparameters(qlab.CATALOG.load("binary_connect")):
        assert f"--method.{parameter.name} " in page


@pytest.mark.parametrize(
    ("name", "option"), [("digits", "data.batch_size"), ("mlp", "net.hidden"), ("vgg_small", "net.width")]
)
def test_describe_shows_data_sets_and_nets(name: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", name]) == 0
    assert f"--{option} " in capsys.readouterr().out


def test_describe_shows_all_that_share_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "adaste"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("method adaste: ")
    assert "\nexperiment adaste: " in page
    assert EXPERIMENTS.load("adaste").claim in page


# ---------------------------------------------------------------------------------------------------------- fit, test


def test_fit_prints_its_result_and_keeps_config_log_and_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *FIT, "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "binary_connect on digits with mlp: 2 epochs in" in printed
    table = reported(printed)
    run = RUN / "version_0"
    assert table["checkpoint"] == str(run / "last.ckpt")
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "metrics.csv", "last.ckpt", "best.ckpt"}
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "val/acc", "val/acc_latent", "test/acc", "test/acc_latent", "quant/flip_ratio"} <= set(header)

    assert main(["test", "--ckpt_path", str(run / "last.ckpt"), "--trainer.enable_progress_bar", "false"]) == 0
    again = reported(capsys.readouterr().out)
    for name in ("test accuracy, deployed net", "test accuracy, latent net"):
        assert again[name] == table[name]


def test_the_saved_config_gives_the_same_bits_again() -> None:
    assert main(["fit", *FIT, "--trainer.max_epochs", "1", "--seed_everything", "3"]) == 0
    config = yaml.safe_load((RUN / "version_0" / "config.yaml").read_text())
    assert (config["method"]["name"], config["method"]["seed"], config["data"]["seed"]) == ("binary_connect", 3, 3)
    assert main(["fit", "--config", str(RUN / "version_0" / "config.yaml")]) == 0
    assert same(weights(RUN / "version_0" / "last.ckpt"), weights(RUN / "version_1" / "last.ckpt"))


def test_the_seed_changes_the_run_and_a_seed_of_ones_own_is_kept() -> None:
    assert main(["fit", *FIT, "--trainer.max_epochs", "1", "--data.seed", "7"]) == 0
    assert main(["fit", *FIT, "--trainer.max_epochs", "1", "--data.seed", "7", "--seed_everything", "1"]) == 0
    assert not same(weights(RUN / "version_0" / "last.ckpt"), weights(RUN / "version_1" / "last.ckpt"))
    assert yaml.safe_load((RUN / "version_1" / "config.yaml").read_text())["data"]["seed"] == 7


def test_fit_equals_the_python_call_bit_for_bit() -> None:
    assert main(["fit", *FIT, "--trainer.max_epochs", "2", "--seed_everything", "5"]) == 0
    data = qlab.data.load("digits", subset=300, seed=5)
    net = qlab.build("mlp", data.input_shape, data.num_classes, hidden=[8], seed=5)
    run = qlab.fit("binary_connect", data, net=net, epochs=2, seed=5, progress=False)
    assert same(weights(RUN / "version_0" / "last.ckpt"), run.method.state_dict())


class InterruptedIn(pl.Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


def _interrupt(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    callbacks = cli_training.LabCLI._checkpoints
    monkeypatch.setattr(cli_training.LabCLI, "_checkpoints", lambda *args: [InterruptedIn(epoch), *callbacks(*args)])


def test_an_interrupted_fit_says_what_is_kept_and_resumes_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *FIT, "--trainer.max_epochs", "3"]) == 0
    with monkeypatch.context() as patch:
        _interrupt(patch, epoch=2)
        assert main(["fit", *FIT, "--trainer.max_epochs", "3"]) == 130
    kept = RUN / "version_1" / "last.ckpt"
    assert f"epoch 3 of 3 was cut short; go on with: qlab fit --ckpt_path {kept}" in capsys.readouterr().err
    assert main(["fit", "--ckpt_path", str(kept)]) == 0
    assert same(weights(RUN / "version_0" / "last.ckpt"), weights(RUN / "version_2" / "last.ckpt"))


def test_a_fit_interrupted_in_its_first_epoch_says_that_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _interrupt(monkeypatch, epoch=0)
    assert main(["fit", *FIT, "--trainer.max_epochs", "1"]) == 130
    assert "nothing is kept" in capsys.readouterr().err


def test_fit_without_a_validation_part_keeps_the_last_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *FIT, "--trainer.max_epochs", "1", "--data.val_fraction", "0"]) == 0
    table = reported(capsys.readouterr().out)
    assert table["validation accuracy"] == "-"
    assert "best validated" not in table
    assert (RUN / "version_0" / "last.ckpt").is_file()


def test_options_are_typed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["fit", *FIT, "--method.lr", "0.25", "--data.batch_size", "64", "--print_config"])
    assert done.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["method"]["lr"], config["data"]["batch_size"], config["net"]["hidden"]) == (0.25, 64, [8])
    assert (config["method"]["name"], config["data"]["name"], config["net"]["name"]) == (
        "binary_connect",
        "digits",
        "mlp",
    )


@pytest.mark.parametrize("method", qlab.CATALOG)
def test_the_full_help_of_every_method_documents_every_hyperparameter(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["fit", "--method", method, "--help"])
    assert done.value.code == 0
    page = capsys.readouterr().out
    for parameter in qlab.methods.hyperparameters(qlab.CATALOG.load(method)):
        assert f"--method.{parameter.name} " in page


# ------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    "words", [["--method", "adaste"], ["--method=adaste"], ["--method", "ste", "--method", "adaste"]]
)
def test_a_name_is_found_and_taken_out_of_the_options(words: list[str]) -> None:
    chosen = choice.choose("fit", [*words, "--method.lr", "0.1"])
    assert chosen.method == "adaste"
    assert chosen.arguments == ("--method.lr", "0.1")


def test_the_command_line_wins_over_a_config_file_and_drops_the_options_of_what_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("method: {name: adaste, lr: 0.5}\ndata: {name: digits, batch_size: 32}\nckpt_path: old.ckpt\n")
    chosen = choice.choose("fit", ["--config", str(path), "--method", "ste"])
    assert (chosen.method, chosen.data) == ("ste", "digits")
    assert chosen.config == {"data": {"name": "digits", "batch_size": 32}}


# ------------------------------------------------------------------------------------------------------------- errors


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one message of a command that must end with status 2 and no traceback."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    message = [line for line in captured.err.splitlines() if not line.startswith("Seed set to")]
    assert message[0].startswith("qlab: ")
    assert "Traceback" not in captured.err
    return "\n".join(message)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit"], "fit needs a method: qlab fit --method NAME"),
        (["fit", "--method"], "--method needs a value"),
        (["fit", "--method", "adast"], "unknown method 'adast'. Did you mean 'adaste'?"),
        (["fit", "--method", "ste", "--data", "mnits"], "unknown data set 'mnits'. Did you mean 'mnist'?"),
        (["fit", "--method", "ste", "--net", "mpl"], "unknown model 'mpl'. Did you mean 'mlp'?"),
        (["fit", "--method", "ste", "--net", "lenet"], "lenet needs images of at least"),
        (
            ["fit", "--method", "ste", "--method.lr", "high"],
            "\"method.lr\": Expected a <class 'float'>. Got value: high",
        ),
        (["fit", "--method", "ste", "--method.lr=-1"], "lr must be"),
        (["fit", "--method", "ste", "--method.rate", "1"], "unrecognized arguments: --method.rate"),
        (["fit", "--method", "ste", "--trainer.accelerator", "abacus"], "the trainer does not take these options"),
        (["fit", "--method", "ste", "--config", "none.yaml"], "none.yaml: not a readable config file"),
        (["fit", "--method", "ste", "--ckpt_path", "none.ckpt"], "none.ckpt: there is no such checkpoint file"),
        (["test"], "test needs data"),
        (["test", "--data", "digits"], "test needs a checkpoint"),
        (["test", "--data", "digits", "--ckpt_path", "none.ckpt"], "none.ckpt: there is no such checkpoint file"),
        (["describe", "adast"], "Did you mean 'adaste'?"),
        (["reproduce", "adast"], "unknown experiment 'adast'. Did you mean 'adaste'?"),
        (["reproduce", "adaste", "--json", "no/such/folder.json"], "cannot be written"),
        (["reproduce", "adaste", "--data", "nothing"], "unknown data set"),
        (["reproduce", "adaste", "--seeds", "0"], "seeds"),
    ],
)
def test_a_mistake_gives_one_clear_message(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in _refused(arguments, capsys)


@pytest.mark.parametrize("content", ["- a list", "method: [", "just words"])
def test_a_broken_config_file_is_one_clear_error(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert "config file" in _refused(["fit", "--method", "ste", "--config", "config.yaml"], capsys)


def test_a_checkpoint_of_another_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *FIT, "--trainer.max_epochs", "1"]) == 0
    capsys.readouterr()
    arguments = ["fit", "--method", "full_precision", "--ckpt_path", str(RUN / "version_0" / "last.ckpt")]
    assert "written by binary_connect, not by full_precision" in _refused(arguments, capsys)


def test_data_of_another_shape_than_the_checkpoints_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *FIT, "--trainer.max_epochs", "1"]) == 0
    capsys.readouterr()
    arguments = ["test", "--ckpt_path", str(RUN / "version_0" / "last.ckpt"), "--data", "two_moons"]
    assert "choose the data set it was trained on" in _refused(arguments, capsys)


class _Poison:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_poisoned_checkpoint_is_refused_and_runs_nothing(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "poisoned"
    torch.save({"state_dict": {}, "qlab": {"method": "ste"}, "payload": _Poison(marker)}, tmp_path / "bad.ckpt")
    pickle.loads(pickle.dumps(_Poison(marker)))  # the payload does work
    assert marker.exists()
    marker.unlink()
    arguments = [stage, "--data", "digits", "--ckpt_path", "bad.ckpt"] + (["--method", "ste"] if stage == "fit" else [])
    assert "not a readable checkpoint" in _refused(arguments, capsys)
    assert not marker.exists()


# ---------------------------------------------------------------------------------------------------------- reproduce

ACC = Metric("acc", "accuracy")


def cell(settings: dict[str, Any], seed: int) -> dict[str, float]:
    return {"acc": settings["acc"] + 0.001 * seed * settings["acc"]}


def _fake(new: float, old: float) -> Experiment:
    return Experiment(
        name="fake",
        title="A fake experiment",
        claim="new is better than old",
        rule=Rule((Difference(ACC, "new", "old", margin=0.0),)),
        metrics=(ACC,),
        function=cell,
        plan=lambda scale, data: Plan(arms={"new": {"acc": new}, "old": {"acc": old}}, seeds=3, parallel=False),
        data=("digits",),
    )


BETTER, WORSE = _fake(0.9, 0.5), _fake(0.5, 0.9)


@pytest.mark.parametrize(
    ("target", "seeds", "verdict", "status"),
    [("BETTER", 3, "holds", 0), ("WORSE", 3, "fails", 3), ("BETTER", 1, "undecided", 4)],
)
def test_reproduce_says_its_verdict_by_its_status_and_in_its_json(
    target: str,
    seeds: int,
    verdict: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(EXPERIMENTS, "_entries", {"fake": Entry("fake", "A fake experiment", f"{__name__}:{target}")})
    assert main(["reproduce", "fake", "--seeds", str(seeds), "--workers", "1", "--json", "out.json"]) == status
    assert f"verdict: {verdict}" in capsys.readouterr().out
    document = json.loads((tmp_path / "out.json").read_text())
    promised = {"experiment", "claim", "verdict", "rule", "command", "device", "versions", "seeds", "rows"}
    assert promised <= set(document)
    assert document["verdict"] == verdict
    assert document["command"] == f"qlab reproduce fake --seeds {seeds} --workers 1 --json out.json"
    assert len(document["rows"]) == 2 * seeds
    assert str(tmp_path) not in json.dumps(document)


def test_reproduce_list_names_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)
