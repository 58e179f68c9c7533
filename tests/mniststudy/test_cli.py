"""The command line: commands do their job, and a mistake gets one sentence and costs nothing."""

import json
import math
import re
import runpy
import shlex
import shutil
import signal
import sys
from dataclasses import replace
from functools import wraps
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from mnistlib import RECIPES, Config, augment, evaluate, load_checkpoint, load_model, train
from mnistlib.checkpoint import save_checkpoint
from mnistlib.paths import outputs_folder
from mniststudy import cli
from mniststudy.cli import main
from mniststudy.notebooks import summarise
from mniststudy.runs import memory
from mniststudy.runs.describe import describe
from mniststudy.runs.ledger import COLUMNS, read_results

LOOP = sys.modules["mnistlib.train"]  # the package's attribute of that name is the function
QUICK = "--epochs 2 --epoch-images 100 --batch-size 25 --ema-decay 0.8 --device cpu --threads 1"
COMMANDS = ["train", "evaluate", "predict", "sweep", "teach", "export", "notebooks", "report",
            "audit"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_digits, tmp_path_factory):
    """Return a run that reads the tiny digits, trained once for all tests."""
    config = Config(epochs=2, batch_size=25, epoch_images=500, max_lr=0.02, device="cpu", threads=1)
    return train(config, tiny_digits, folder=tmp_path_factory.mktemp("trained"))


@pytest.fixture
def loads_tiny(tiny_digits, monkeypatch):
    """Have the commands read the tiny digits, and return what they asked for."""
    asked = []
    monkeypatch.setattr("mnistlib.load_mnist", lambda *s: asked.extend(s) or tiny_digits)
    return asked


@pytest.fixture
def desk(trained, tmp_path, monkeypatch):
    """Stand in a folder with a checkpoint, a broken one, a text and a picture of a digit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MNISTLIB_DATA", "unset")  # no test reads, or fetches, the real digits
    raw = trained.checkpoint.read_bytes()
    Path("good.pth").write_bytes(raw)
    Path("broken.pth").write_bytes(raw[:-1000])
    Path("text.png").write_text("no picture")
    return tmp_path


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(arguments: str) -> int:
    """Run a command line; a `_` within a word stands for a space."""
    return main([word.replace("_", " ") for word in arguments.split()])


def error_of(arguments: str, capsys) -> str:
    """Run a command that must fail, and return the sentence that it says."""
    assert run(arguments) == 1, arguments
    out, err = capsys.readouterr()
    assert (out, err[:7], err.count("\n")) == ("", "error: ", 1)
    return err


def ends(arguments: str, capsys) -> tuple[int, str]:
    """Run a command that ends while its line is read; return the exit code and what it says."""
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    return ended.value.code, "".join(capsys.readouterr())


def test_a_mistake_is_one_sentence_and_changes_nothing(desk, capsys):
    here = torch.accelerator.current_accelerator(check_available=True)
    missing = "mps" if here and here.type != "mps" else "xpu"
    before = files(desk)
    for arguments, named in {
        "train --recipe slow": "recipe is 'slow'",
        f"train --device {missing} --data nowhere": f"device is '{missing}'",
        "train --data nowhere": "folder nowhere has no train-images",
        "train --folder text.png": "text.png",
        "train --resume broken.pth": "broken.pth",
        "train --resume=good.pth --batch-size=9": "--resume",
        "train --resume good.pth --seed 0": "--resume",
        "train --resume good.pth --recipe reference-fast": "--resume",
        "sweep --stacked --curves": "--curves",
        "sweep --keep here": "--keep",
        "evaluate broken.pth --data sample": "broken.pth",
        "predict text.png --checkpoint good.pth": "text.png",
        "predict text.png --checkpoint broken.pth": "broken.pth",
        "export good.pth": "unset has no train-images",
        "teach broken.pth --data sample": "broken.pth",
        "teach good.pth --views 0": "--views is 0",
        "notebooks no-such-notebook": "no-such-notebook",
    }.items():
        assert named in error_of(arguments, capsys), arguments
    for seeds in ("3:1", "3:3", "a", "-1:2", "1:", "", "0:2:4"):
        assert "FROM:TO, as in 0:20, which is 0 to 19" in error_of(f"sweep --seeds={seeds}", capsys)
    after = files(desk)
    assert after | before == after
    new = {path.name for path in after.keys() - before.keys()}
    assert all(name.startswith((".lock", ".training")) for name in new)


def test_a_wrong_command_line_exits_with_2_and_names_the_fault(desk, capsys):
    before = files(desk)
    for arguments, named in {
        "": "subcommand",
        "fly": "fly",
        "train --epochs 2.5": "2.5",
        "train --recipe": "--recipe",
        "sweep --seed 3": "--seed",
        "predict": "required",
    }.items():
        code, said = ends(arguments, capsys)
        assert (code, named in said, "Traceback" in said) == (2, True, False), said
    assert files(desk) == before


def test_a_ledger_that_is_none_is_one_sentence_before_anything_is_trained(
    desk, capsys, monkeypatch
):
    """Digits are not looked for: MNISTLIB_DATA names none, which would be said instead."""
    path, header = Path("ledger/runs.csv"), ",".join(COLUMNS)
    path.parent.mkdir()
    ways = {"text.png": "text.png", "text.png/inside": "text.png", "ledger": "ledger/runs.csv"}
    for table in (header.replace(",python", ""), header + "\nfast,62262f61,", "\x00\x01"):
        path.write_text(f"{table}\n")
        for command in ("train", "sweep", "audit", "teach good.pth"):
            for folder, named in ways.items():
                said = error_of(f"{command} --ledger {folder}", capsys)
                assert (named in said, "unset" in said) == (True, False)
    path.unlink()
    for command in ("train", "sweep", "teach good.pth"):  # else the above could pass for any reason
        assert "unset has no" in error_of(f"{command} --ledger ledger", capsys)
    monkeypatch.setenv("MNISTLIB_RUNS", "text.png")
    for command in ("train", "sweep"):
        assert "text.png" in error_of(command, capsys)


def test_report_and_audit_say_by_their_exit_code_what_they_found(capsys, monkeypatch):
    monkeypatch.setattr("mniststudy.runs.pages.write_report", lambda check: check)
    assert (run("report --check"), run("report")) == (1, 0)
    assert (
        capsys.readouterr().out
        == "README and docs are not up to date\nREADME and docs are up to date\n"
    )
    audit = Mock(return_value=False)
    monkeypatch.setattr("mniststudy.runs.audit.audit", audit)
    assert run("audit --recipe 62262f61 --minutes 2.5 --ledger here") == 1
    audit.assert_called_once_with(Path("here"), "62262f61", 2.5)


def test_train_saves_records_and_says_where(desk, capsys, loads_tiny, runs_folder, tiny_digits):
    assert run(f"train {QUICK} --data mnist --seed 5 --test") == 0
    out, err = capsys.readouterr()
    assert (loads_tiny, err) == (["mnist"], "")
    (checkpoint,) = runs_folder.rglob("*.pth")
    config = Config(**load_checkpoint(checkpoint)["config"])
    assert (config.seed, config.epochs, config.ema_decay) == (5, 2, 0.8)
    assert config.degrees == RECIPES["reference-fast"].degrees
    assert checkpoint.parent.name == config.run_name("mnist")
    seen = evaluate(load_model(checkpoint), tiny_digits.test_images, tiny_digits.test_labels)
    assert [row.split()[0] for row in out.splitlines()[:4]] == ["Epoch", "1", "2", "reference:"]
    assert out.splitlines()[4:] == [f"test: {seen}", f"checkpoint: {checkpoint}"]
    row = json.loads((checkpoint.parent / "run.json").read_text())["row"]
    assert (row["config_hash"], row["test_accuracy"]) == (config.hash("mnist"), seen.accuracy)
    assert row["memory_mb"] >= row["optimizer_mb"] >= 0
    assert 50 < memory.AT_IMPORT + row["memory_mb"] < 50_000  # a process with torch
    (line,) = (runs_folder / "runs.csv").read_text().splitlines()[1:]
    assert line.startswith(f"custom,{config.hash('mnist')},5,mnist,random,reference,13912,")


def test_settings_that_are_not_given_are_those_of_the_recipe(monkeypatch, loads_tiny):
    asked: list[Config] = []

    stopped = Mock(interrupted=True, signal=signal.SIGINT, checkpoint=None)
    monkeypatch.setattr("mnistlib.train", lambda c, *a, **k: asked.append(c) or stopped)
    monkeypatch.setattr("mniststudy.runs.sweep.sweep", lambda c, *a, **k: (asked.extend(c), 1))
    fast, best = RECIPES["fast"], RECIPES["best"]
    for line, code, configs in (
        ("train", 130, [RECIPES["reference-fast"]]),
        ("train --recipe reference --seed 1", 130, [replace(RECIPES["reference"], seed=1)]),
        ("train --recipe=best --no-cycle-momentum --pool 1e234567 --model c4k3_p_full", 130,
         [replace(best, pool="1e234567", model="c4k3 p full")]),
        ("sweep --recipe fast --seeds 3:5 --max-lr 1e-2", 1,
         [replace(fast, seed=seed, max_lr=0.01) for seed in (3, 4)]),
        ("sweep --seeds 7", 1, [replace(RECIPES["reference-fast"], seed=7)]),
    ):  # fmt: skip
        assert (run(line), asked) == (code, configs)
        asked.clear()
    stacked = Mock(return_value=(5, 0))
    monkeypatch.setattr("mniststudy.runs.stacked.sweep_stacked", stacked)
    assert run("sweep --recipe best --stacked --keep here --test --data mnist") == 0
    configs = [replace(best, seed=seed) for seed in range(5)]
    stacked.assert_called_once_with(configs, None, keep=Path("here"), test=True, data="mnist")


def test_evaluate_says_what_is_reached(desk, capsys, loads_tiny, trained, tiny_digits, monkeypatch):
    assert main(["evaluate", "good.pth"]) == 0
    said = {line[:12].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}
    test = evaluate(trained.model, tiny_digits.test_images, tiny_digits.test_labels)
    assert said["test"] == str(test)
    assert said["validation"].startswith(f"{trained.history[-1]['val_acc']:.2f} % of 100 images")
    sample = replace(tiny_digits, test_images=None, test_labels=None, source="sample")
    monkeypatch.setattr("mnistlib.load_mnist", lambda source: sample)
    # the sample has no split by writers, which the checkpoint may have been trained with
    monkeypatch.delattr("mnistlib.Digits.split")
    assert main(["evaluate", "good.pth"]) == 0
    said = {line[:12].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}
    assert "'mnist'" in said["note"]
    assert ("validation" in said, said["test"][:4]) == (False, "none")


def test_the_summary_says_what_came_out(trained, tmp_path, tiny_digits):
    checkpoint = tmp_path / "a run" / trained.checkpoint.name
    for path in (checkpoint, tmp_path / "figures/01-1.png", tmp_path / "figures/01-2.png"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(trained.checkpoint.read_bytes())
    (tmp_path / "01.ipynb").touch()
    text = summarise(tmp_path, tiny_digits)
    said = {line[:12].strip(): line[12:] for line in text.splitlines()}
    assert (said["checkpoint"], said["notebook"]) == (str(checkpoint), str(tmp_path / "01.ipynb"))
    assert said["figures"] == f"{tmp_path / 'figures'} (2 pictures)"
    reached = f"{trained.history[-1]['val_acc']:.2f} %"
    assert re.search(rf"validation accuracy +99\.41 % +99\.\d+ % +{reached}\n", text)
    text = summarise(tmp_path, replace(tiny_digits, source="sample", test_images=None))
    assert text.startswith("ON THE EMBEDDED SAMPLE")
    assert "this run, on the sample" in text
    content = load_checkpoint(checkpoint)  # as if stopped after two epochs of nine
    stopped = save_checkpoint(content | {"config": content["config"] | {"epochs": 9}}, tmp_path)
    said = describe(stopped, tiny_digits, compare=True)
    assert re.search(r"training images seen +- +1,000,000 +1,000\n", said)


def test_export_and_notebooks_pass_on_what_they_are_given(desk, capsys, loads_tiny, monkeypatch):
    export, execute = Mock(return_value=[Path("text.png")]), Mock()
    monkeypatch.setattr("mniststudy.use.export.export", export)
    assert run("export good.pth --folder new") == 0
    assert capsys.readouterr().out == "text.png: 10 bytes\n"
    assert (export.call_args[0][0], export.call_args[0][2]) == (Path("good.pth"), Path("new"))
    monkeypatch.setattr("mniststudy.notebooks.run_notebooks", execute)
    monkeypatch.setattr("mniststudy.notebooks.summarise", lambda *_: "a summary")
    assert run("notebooks 03 07 -p seed 1 --parameter pool 1e234567 --folder here") == 0
    (paths, parameters, folder), _ = execute.call_args
    assert [path.name[:2] for path in paths] == ["03", "07"]
    assert (parameters, folder) == ({"seed": "1", "pool": "1e234567"}, Path("here"))
    assert re.search(r"\na summary\nall in      \d+ s\n", capsys.readouterr().out)


def test_an_interrupted_run_is_resumed_to_the_same_bits(
    desk, capsys, monkeypatch, loads_tiny, runs_folder
):
    assert run(f"train {QUICK} --folder whole --ledger whole") == 0
    whole = load_checkpoint(next(Path("whole").glob("*.pth")))["model_state_dict"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        calls = []

        def stopping(images, calls=calls, number=number, **ranges):
            calls.append(1)
            if len(calls) == 6:
                signal.raise_signal(number)
            return augment(images, **ranges)

        with monkeypatch.context() as m:
            m.setattr(LOOP, "augment", stopping)
            line = f"train {QUICK} --folder my_runs --ledger my_ledger --test --data mnist"
            assert run(line) == code
        *_, said = capsys.readouterr().out.splitlines()
        assert not Path("my ledger/runs.csv").exists()
        with monkeypatch.context() as m:  # as printed, from another folder
            m.chdir("/")
            m.delenv("MNISTLIB_RUNS")
            assert main(shlex.split(said.removeprefix("Continue with: mnist "))) == 0
        assert loads_tiny[-2:] == ["mnist", "mnist"]
        (resumed,) = Path("my runs").glob("*.pth")
        weights = load_checkpoint(resumed)["model_state_dict"]
        assert all(torch.equal(weights[k], whole[k]) for k in whole)
        assert read_results(folder=Path("my ledger"))["n_test"].tolist() == [100]
        assert not runs_folder.exists()
        shutil.rmtree("my ledger")
        shutil.rmtree("my runs")


def test_a_finished_run_that_is_resumed_is_recorded_once(desk, capsys, trained, loads_tiny):
    """It may have ended between its last checkpoint and its record; tested, it counts anew."""
    Path("folder").mkdir()
    content = load_checkpoint(trained.checkpoint)
    content["versions"]["torch"] = "1.0"
    save_checkpoint(content, Path("folder"))
    for given, done in (("folder", "checkpoint: "), ("folder --test", "test: "), ("folder", "")):
        assert run(f"train --resume {given} --ledger folder") == 0
        out, err = capsys.readouterr()
        assert (done or "finished run that is in the ledger: nothing is done") in out
        assert ("Epoch" in out, err) == (False, "")
    assert len(loads_tiny) == 2
    (row,) = read_results(folder=Path("folder")).to_dict("records")
    assert (row["config_hash"], row["n_test"]) == (content["config_hash"], 100)
    assert (row["torch"], math.isnan(row["memory_mb"])) == ("1.0", True)


def test_ctrl_c_ends_with_130_and_names_no_checkpoint_where_there_is_none(
    capsys, monkeypatch, loads_tiny
):
    interrupted = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(LOOP, "augment", interrupted)  # as a second Ctrl-C does
    assert run(f"train {QUICK}") == 130
    assert "None" not in capsys.readouterr().out
    monkeypatch.setattr("mnistlib.load_mnist", interrupted)
    assert (run("train"), capsys.readouterr()) == (130, ("", "interrupted\n"))


def test_help_lists_the_commands_and_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # wide enough not to break a text
    assert re.findall(r"• (\w+) +\w+ .+\.", ends("--help", capsys)[1]) == COMMANDS
    for command in COMMANDS:
        code, said = ends(f"{command} --help", capsys)
        assert (code, said.startswith(f"usage: mnist {command}")) == (0, True)
        options = re.findall(r"│ (-.*?)  +(?:│\n│ +)?([^│]*?) *│\n", said)
        assert all(re.match(r"\w.*\w{3}", text) for _, text in options), options


def test_help_shows_every_setting_as_the_recipe_has_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    option = r"--([a-z-]+)(?: [A-Z]+|, --no-[a-z-]+)[ │]+\w.+? \(default: (.+?)\)"
    for command, left_out in (("train", ""), ("sweep", "seed")):
        said = ends(f"{command} --recipe best --help", capsys)[1].partition("settings options")[2]
        shown = {k.replace("-", "_"): v for k, v in re.findall(option, " ".join(said.split()))}
        values = vars(RECIPES["best"]).items()
        settings = {k: str(v) or "''" for k, v in values if k != left_out}
        assert shown == settings


def test_every_command_that_is_written_in_a_document_is_read_from_any_folder(desk, monkeypatch):
    """What a command does is replaced; reading its line and its settings is not."""
    for name in COMMANDS:
        monkeypatch.setattr(cli, name, wraps(getattr(cli, name))(lambda *_, **__: 0))
    root = outputs_folder().parent
    texts = [root / "README.md", root / "CONTRIBUTING.md", root / "outputs" / "README.md"]
    texts += [*root.glob("docs/*.md"), *root.glob("notebooks/*.ipynb")]
    whole = "".join(path.read_text(encoding="utf-8") for path in texts).replace('\\"', '"')
    found = {*re.findall(r"(?:`|^)mnist (\w[^`\n]*)", whole, re.MULTILINE)}
    named = {"teach", "predict", "train --resume"}  # written without what they need
    assert len(found) > 20
    for line in sorted(found - named):
        words = shlex.split(re.sub(r"\bNAME\b", "best", line))
        try:
            code = main(words)
        except SystemExit as end:  # --help
            code = end.code
        assert code == 0, line
    assert {line.split()[0] for line in found} == {*COMMANDS}


def test_it_works_without_docstrings_as_under_python_OO(capsys, monkeypatch):
    for name in COMMANDS:
        monkeypatch.delattr(f"mniststudy.cli.{name}.__doc__")
    assert all(name in ends("--help", capsys)[1] for name in COMMANDS)
    assert "--recipe" in ends("train --help", capsys)[1]
    assert "epochs is 0" in error_of("train --epochs 0", capsys)


def test_python_m_ends_with_the_exit_code_of_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mnist", "train", "--epochs", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mniststudy", run_name="__main__")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: epochs is 0, but it must be from 1 to 10,000\n"
