"""The command line: commands do their job, and a mistake gets one sentence and costs nothing."""

import ast
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mnistlib import (
    RECIPES,
    Config,
    augment,
    evaluate,
    load_checkpoint,
    load_model,
    released_checkpoint,
    train,
)
from mniststudy.cli import main, parse, summarise
from mniststudy.runs.ledger import COLUMNS
from mniststudy.use.pictures import Calibration, load_calibration

LOOP = sys.modules["mnistlib.train"]  # the package's attribute of that name is the function
QUICK = ["--epochs", "2", "--epoch-images", "250", "--batch-size", "25", "--ema-decay", "0.8",
         "--device", "cpu", "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_digits, tmp_path_factory):
    """Return a run that reads the tiny digits, trained once for all tests."""
    config = Config(epochs=3, batch_size=25, epoch_images=500, max_lr=0.02, device="cpu", threads=1)
    return train(config, tiny_digits, folder=tmp_path_factory.mktemp("trained"))


@pytest.fixture
def loads_tiny(tiny_digits, monkeypatch):
    """Have the commands read the tiny digits, and return what they asked for."""
    asked = []
    monkeypatch.setattr("mnistlib.load_mnist", lambda s: asked.append(s) or tiny_digits)
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


COMMANDS = [
    "train",
    "sweep",
    "pool",
    "bench",
    "audit",
    "evaluate",
    "predict",
    "calibrate",
    "export",
    "notebooks",
    "report",
]


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def picture(images: torch.Tensor, number: int, path: str) -> str:
    Image.fromarray(images[number, 0].numpy()).save(path)
    return path


def ends_with_an_error_line(arguments, capsys) -> str:
    """Run a command that must fail, and return what it says."""
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "Traceback" not in out + err
    return err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("train --recipe slow", "recipe is 'slow'"),
        ("train --model vgg", "model is 'vgg'"),
        ("train --device tpu", "device is 'tpu'"),
        ("train --epochs 0", "epochs is 0"),
        ("train --epochs 2.5", "epochs is '2.5'"),
        ("train --max-lr abc", "max_lr is 'abc'"),
        ("train --max-lr nan", "max_lr is 'nan'"),
        ("train --data nowhere", "folder nowhere has no train-images"),
        ("train --data good.pth", "folder good.pth has no train-images"),
        ("train --data .", "folder . has no train-images-idx3-ubyte"),
        ("train --resume broken.pth", "broken.pth"),
        ("train --resume missing.pth", "missing.pth"),
        ("train --resume good.pth --epochs 9", "--resume"),
        ("train --resume good.pth --seed 0", "--resume"),
        ("train --resume good.pth --recipe reference", "--resume"),
        ("sweep --recipe slow", "recipe is 'slow'"),
        ("sweep --workers -1", "--workers is -1, but it must be from 0"),
        ("sweep --data nowhere", "folder nowhere has no train-images"),
        ("sweep --only focus", "--only is for --ablations"),
        ("sweep --ablations 2 --dropout 0.1", "--ablations has its own settings"),
        ("sweep --ablations 2 --recipe fast", "--ablations has its own settings"),
        ("sweep --ablations 0", "epochs is 0"),
        ("sweep --ablations 2 --only focuss", "--only is 'focuss', but it must be one of as it is"),
        ("bench --curves alexnet", "--curves is 'alexnet', but it must be one of reference"),
        ("evaluate broken.pth", "broken.pth"),
        ("evaluate text.png", "text.png"),
        ("evaluate missing.pth", "missing.pth"),
        ("evaluate good.pth --data nowhere", "folder nowhere has no"),
        ("predict text.png --checkpoint good.pth", "text.png"),
        ("predict missing.png --checkpoint good.pth", "missing.png"),
        ("predict text.png --checkpoint broken.pth", "broken.pth"),
        ("export broken.pth", "broken.pth"),
        ("export missing.pth", "missing.pth"),
        ("export good.pth", "folder unset has no train-images"),
        ("calibrate broken.pth", "broken.pth"),
        ("calibrate good.pth missing.pth", "missing.pth"),
        ("calibrate good.pth good.pth --data sample", "good.pth was trained on"),
        ("notebooks no-such-notebook", "no-such-notebook"),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(desk, capsys, arguments, named):
    before = files(desk)
    assert named in ends_with_an_error_line(arguments.split(), capsys)
    assert files(desk) == before


def test_a_device_that_is_not_here_is_an_error(desk, capsys):
    here = torch.accelerator.current_accelerator(check_available=True)
    missing = "mps" if here and here.type != "mps" else "xpu"
    before = files(desk)
    arguments = ["train", "--device", missing, "--data", "nowhere"]
    assert f"device is '{missing}'" in ends_with_an_error_line(arguments, capsys)
    assert files(desk) == before


@pytest.mark.parametrize(
    "arguments",
    ["", "fly", "train --learning-rate 1", "train --epochs", "predict", "evaluate a b"],
)
def test_a_wrong_command_line_exits_with_2(desk, capsys, arguments):
    before = files(desk)
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert "usage: mnist" in capsys.readouterr().err
    assert files(desk) == before


def test_a_folder_that_is_a_file_is_an_error(desk, capsys):
    before = files(desk)
    message = ends_with_an_error_line(["train", *QUICK, "--folder", "text.png"], capsys)
    assert "text.png cannot be a folder" in message
    assert files(desk) == before


HEADER = ",".join(COLUMNS)
TABLES = {
    "of other columns": HEADER.replace(",python", "").encode() + b"\n",
    "of columns in another order": HEADER.replace("epochs,n_val", "n_val,epochs").encode() + b"\n",
    "binary": bytes(range(256)),
    "in UTF-16": (HEADER + "\n").encode("utf-16"),
    "with half a line": (HEADER + "\nfast,62262f61,").encode(),
    "a directory": None,
}


@pytest.mark.parametrize("command", ["train", "sweep", "bench", "bench --ladder", "audit"])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_is_none_is_one_sentence_before_anything_is_trained(
    desk, capsys, command, table
):
    path = Path("ledger/runs.csv")
    path.parent.mkdir()
    path.mkdir() if TABLES[table] is None else path.write_bytes(TABLES[table])
    before = files(desk)
    # digits are not looked for: MNISTLIB_DATA names none, which would be said instead
    said = ends_with_an_error_line([*command.split(), "--ledger", "ledger"], capsys)
    assert "ledger/runs.csv" in said
    assert files(desk) == before


@pytest.mark.parametrize("command", ["train", "sweep", "bench", "audit"])
@pytest.mark.parametrize("folder", ["text.png", "text.png/inside"])
def test_a_ledger_that_cannot_be_a_folder_is_one_sentence_before_anything_is_trained(
    desk, capsys, command, folder
):
    before = files(desk)
    said = ends_with_an_error_line([command, "--ledger", folder], capsys)
    assert folder in said
    assert "unset" not in said
    assert files(desk) == before


@pytest.mark.parametrize("command", ["train", "sweep", "bench"])
def test_the_folder_of_runs_is_checked_where_no_ledger_is_named(desk, capsys, monkeypatch, command):
    monkeypatch.setenv("MNISTLIB_RUNS", "text.png")
    assert "text.png" in ends_with_an_error_line([command], capsys)


def test_with_a_good_ledger_what_is_missing_are_the_digits(desk, capsys):
    """Else the tests above would pass for another reason."""
    for command in ("train", "sweep", "bench"):
        said = ends_with_an_error_line([command, "--ledger", "ledger"], capsys)
        assert said.startswith("error: the folder unset has no train-images")


@pytest.mark.parametrize("missing", ["README.md", "marks", "speed.csv"])
def test_a_report_that_cannot_be_written_is_an_error(desk, capsys, monkeypatch, missing):
    for module in ("ledger", "report"):
        monkeypatch.setattr(f"mniststudy.runs.{module}.outputs_folder", lambda: desk / "outputs")
    if missing != "speed.csv":
        for block in ("headline", "speed", "promises"):
            monkeypatch.setattr(f"mniststudy.runs.report.{block}", lambda: "a table")
    if missing != "README.md":
        Path("README.md").write_text("no marks")
    before = files(desk)
    assert missing in ends_with_an_error_line(["report"], capsys)
    assert files(desk) == before


@pytest.mark.parametrize(("changed", "code"), [(True, 1), (False, 0)])
def test_checking_the_report_says_whether_it_is_up_to_date(capsys, monkeypatch, changed, code):
    monkeypatch.setattr("mniststudy.runs.report.write_report", lambda check: check and changed)
    assert main(["report", "--check"]) == code
    assert capsys.readouterr().out == f"README.md is {'not ' * changed}up to date\n"


def test_train_saves_records_and_says_where(desk, capsys, loads_tiny, runs_folder, tiny_digits):
    assert main(["train", *QUICK, "--data", "mnist", "--seed", "5", "--test"]) == 0
    out, err = capsys.readouterr()
    assert (loads_tiny, err) == (["mnist"], "")
    checkpoint = sorted(runs_folder.rglob("*.pth"))[-1]
    content = load_checkpoint(checkpoint)
    config = Config(**content["config"])
    assert (config.seed, config.epochs, config.ema_decay) == (5, 2, 0.8)
    assert config.degrees == RECIPES["reference-fast"].degrees
    assert checkpoint.parent.name == config.run_name("mnist")
    seen = evaluate(load_model(checkpoint), tiny_digits.test_images, tiny_digits.test_labels)
    title, *rows = out.splitlines()
    assert title.startswith("Epoch  Train Loss  Val Loss")
    assert [row.split()[0] for row in rows[:2]] == ["1", "2"]
    assert rows[2].startswith("reference: ")
    assert rows[3:] == [f"test: {seen}", f"checkpoint: {checkpoint}"]
    record = json.loads((checkpoint.parent / "run.json").read_text())
    row = record["row"]
    assert (row["config_hash"], row["seed"]) == (config.hash("mnist"), 5)
    assert (row["n_test"], row["test_accuracy"]) == (seen.n, seen.accuracy)
    assert [epoch["epoch"] for epoch in record["history"]] == [1, 2]
    assert tuple(record["wrong"]) == seen.wrong
    assert row["memory_mb"] >= row["optimizer_mb"] >= 0
    (line,) = (runs_folder / "runs.csv").read_text().splitlines()[1:]
    assert line.startswith(f"custom,{config.hash('mnist')},5,mnist,random,reference,13912,")


def test_train_without_settings_trains_the_published_network(monkeypatch, loads_tiny):
    asked = []

    def remember(config, *args, **kwargs):
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("mnistlib.train", remember)
    assert main(["train"]) == 130
    assert main(["train", "--recipe", "reference", "--seed", "1"]) == 130
    assert [(c.recipe, c.seed) for c in asked] == [("reference-fast", 0), ("reference", 1)]
    assert loads_tiny == ["auto", "auto"]


def test_evaluate_says_what_a_checkpoint_reaches(desk, capsys, loads_tiny, trained, tiny_digits):
    assert main(["evaluate", "good.pth"]) == 0
    out, err = capsys.readouterr()
    said = {line[:12].strip(): line[12:] for line in out.splitlines()}
    test = evaluate(trained.model, tiny_digits.test_images, tiny_digits.test_labels)
    assert err == ""
    assert said["test"] == str(test)
    assert said["validation"].startswith(f"{trained.history[-1]['val_acc']:.2f} % of 100 images")
    assert said["network"] == "reference, 13,912 parameters"
    assert "3 of 3 epochs" in said["training"]


def test_the_summary_says_what_came_out(trained, tmp_path, tiny_digits):
    checkpoint = tmp_path / "a run" / trained.checkpoint.name
    for path in (checkpoint, tmp_path / "figures/01-1.png", tmp_path / "figures/01-2.png"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(trained.checkpoint.read_bytes())
    (tmp_path / "01.ipynb").touch()
    text = summarise(tmp_path, tiny_digits, began=0.0)
    said = {line[:12].strip(): line[12:] for line in text.partition("\n\n")[0].splitlines()}
    assert said["network"] == "reference, 13,912 parameters"
    assert said["training"].endswith(" s on cpu")
    assert said["validation"].startswith(f"{trained.history[-1]['val_acc']:.2f} % of 100 images")
    assert said["checkpoint"] == str(checkpoint)
    assert said["figures"] == f"{tmp_path / 'figures'} (2 pictures)"
    assert said["notebook"] == str(tmp_path / "01.ipynb")
    assert said["all in"].endswith(" s")
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    reached = f"{trained.history[-1]['val_acc']:.2f} %"
    (row,) = [row for row in rows if row[0] == "validation accuracy"]
    assert (row[1], row[3]) == ("99.41 %", reached)  # published, ours over seeds, this run
    sample = replace(tiny_digits, source="sample", test_images=None)
    text = summarise(tmp_path, sample, began=0.0)
    assert text.startswith("ON THE EMBEDDED SAMPLE")
    assert "this run, on the sample" in text


def test_evaluate_on_digits_of_another_source_says_so(
    desk, capsys, monkeypatch, trained, tiny_digits
):
    sample = replace(tiny_digits, test_images=None, test_labels=None, source="sample")
    monkeypatch.setattr("mnistlib.load_mnist", lambda source: sample)
    # the sample has no split by writers, which the checkpoint may have been trained with
    monkeypatch.delattr("mnistlib.Digits.split")
    assert main(["evaluate", "good.pth"]) == 0
    said = {line[:12].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}
    assert "'mnist'" in said["note"]
    assert "validation" not in said
    assert said["test"].startswith("none")


def test_predict_says_which_digit_each_picture_shows(desk, capsys, trained, tiny_digits):
    seen = evaluate(trained.model, tiny_digits.test_images, tiny_digits.test_labels)
    assert seen.accuracy > 95  # else a wrong prediction would say nothing
    guesses = trained.model(tiny_digits.test_images).argmax(1)
    paths = [picture(tiny_digits.test_images, i, f"{i}.png") for i in range(12)]
    assert main(["predict", *paths, "--checkpoint", "good.pth"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [(str(int(guess)), f"not sure ({int(guess)} at ") for guess in guesses]
    for path, line, starts in zip(paths, lines, said, strict=False):
        assert line.removeprefix(f"{path}: ").startswith(starts)
        assert line.endswith(" %)")


def test_calibrate_writes_what_predict_then_uses(
    desk, capsys, monkeypatch, loads_tiny, tiny_digits
):
    found = Calibration(temperature=0.5, sure=1.1, evidence=None)
    asked = []

    def fit(model, images, labels):
        asked.append((images, labels))
        return found

    monkeypatch.setattr("mniststudy.use.rendered.calibrate", fit)
    assert main(["calibrate", "good.pth", "good.pth"]) == 0
    held_out = tiny_digits.split("random")[1]
    assert torch.equal(asked[0][1], tiny_digits.train_labels[held_out])
    content = json.loads(Path("calibration.json").read_text(encoding="utf-8"))
    assert content["checkpoint"] == "good.pth"
    assert content["twin"]["n"] == len(held_out)
    assert load_calibration("good.pth") == found
    capsys.readouterr()
    path = picture(tiny_digits.test_images, 0, "0.png")
    assert main(["predict", path, "--checkpoint", "good.pth"]) == 0
    assert "0.png: not sure (" in capsys.readouterr().out


def test_a_twin_that_was_trained_with_other_settings_is_refused(desk, capsys, loads_tiny):
    best = released_checkpoint()
    before = best.with_name("calibration.json").read_bytes()
    assert "good.pth is no twin of" in ends_with_an_error_line(["calibrate", "good.pth"], capsys)
    assert best.with_name("calibration.json").read_bytes() == before


def test_the_twin_of_a_distilled_network_has_another_pool_but_not_none(
    desk, capsys, monkeypatch, loads_tiny
):
    """Twin and released network differ in their teachers, who must not know the twin's digits."""
    content = load_checkpoint("good.pth")
    checkpoints = {"none.pth": "", "pool.pth": "0" * 8, "other.pth": "1" * 8}

    def load(path):
        config = content["config"] | {"pool": checkpoints[Path(path).name], "degrees": 0.0}
        return content | {"config": config}

    monkeypatch.setattr("mnistlib.load_checkpoint", load)
    monkeypatch.setattr("mnistlib.load_model", lambda path: None)
    found = Calibration(temperature=0.5, sure=1.1, evidence=None)
    monkeypatch.setattr("mniststudy.use.rendered.calibrate", lambda *_: found)
    for pair in (["none.pth", "pool.pth"], ["pool.pth", "none.pth"]):
        assert "is no twin of" in ends_with_an_error_line(["calibrate", *pair], capsys)
    assert not Path("calibration.json").exists()
    assert main(["calibrate", "other.pth", "pool.pth"]) == 0
    twin = json.loads(Path("calibration.json").read_text(encoding="utf-8"))["twin"]
    assert twin["pool"] == "1" * 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_resumed_to_the_same_bits(
    desk, capsys, monkeypatch, loads_tiny, runs_folder, number, code
):
    assert main(["train", *QUICK, "--folder", "whole", "--ledger", "whole"]) == 0
    whole = load_checkpoint(next(Path("whole").glob("*.pth")))["model_state_dict"]
    calls = []

    def stopping(images, **ranges):
        calls.append(1)
        if len(calls) == 13:
            signal.raise_signal(number)
        return augment(images, **ranges)

    with monkeypatch.context() as m:
        m.setattr(LOOP, "augment", stopping)
        capsys.readouterr()
        assert main(["train", *QUICK]) == code
    checkpoint = sorted(runs_folder.rglob("*.pth"))[-1]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"Continue with: mnist train --resume {checkpoint}"
    assert not (runs_folder / "runs.csv").exists()
    assert main(["train", "--resume", str(checkpoint.parent)]) == 0
    (resumed,) = runs_folder.rglob("*.pth")
    weights = load_checkpoint(resumed)["model_state_dict"]
    assert all(torch.equal(weights[k], whole[k]) for k in whole)
    assert len((runs_folder / "runs.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("seeds", ["3:1", "3:3", "a", "-1:2", "1:", "", "0:2:4"])
def test_seeds_that_are_none_are_refused(capsys, seeds):
    with pytest.raises(SystemExit) as ended:
        main(["sweep", f"--seeds={seeds}"])
    assert ended.value.code == 2
    assert "is not FROM:TO, as in 0:20, which is 0 to 19" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["good.pth", "."])
def test_resuming_a_finished_run_records_nothing_and_says_that_it_is_finished(
    desk, capsys, runs_folder, given
):
    Path("good.pth").rename("mnist_model_1.pth" if given == "." else "good.pth")
    before = files(desk)
    # neither digits nor a good ledger are needed: nothing is done
    command = ["train", "--resume", given, "--test", "--ledger", "text.png"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")
    assert "belongs to a finished run: nothing is trained or recorded" in out
    assert files(desk) == before
    assert not runs_folder.exists()


def test_a_run_stopped_before_its_first_checkpoint_names_none(
    capsys, monkeypatch, loads_tiny, runs_folder
):
    def stopping(images, **ranges):
        raise KeyboardInterrupt  # as a second Ctrl-C does

    monkeypatch.setattr(LOOP, "augment", stopping)
    assert main(["train", *QUICK]) == 130
    assert "None" not in capsys.readouterr().out
    assert list(runs_folder.rglob("*.pth")) == []


def test_ctrl_c_outside_of_training_ends_with_130(capsys, monkeypatch):
    def interrupted(source):
        raise KeyboardInterrupt

    monkeypatch.setattr("mnistlib.load_mnist", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_help_explains_every_setting(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "1000")  # wide enough not to break a text
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    (body,) = ast.parse(inspect.getsource(Config)).body
    texts = {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    assert set(texts) == {f.name for f in fields(Config)}
    for field in fields(Config):
        option = f"--{field.name.replace('_', '-')} {field.type.__name__} {texts[field.name]}"
        assert (option in said) == (command == "train" or field.name != "seed"), option
    assert all(name in said for name in RECIPES)


def test_every_option_of_a_command_is_explained(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out.split("options:\n")[1].splitlines()
        assert all(re.fullmatch(r"  -.*\S {2,}\S.*|  --.{22,}|\s+\S.*", line) for line in shown)


def test_options_are_read_as_what_they_are(desk):
    def read(text):
        return vars(parse(text.split()))

    train_ = read("train --ledger a/b --test --max-lr 1e-2")
    assert (train_["ledger"], train_["test"], train_["data"]) == (Path("a/b"), True, "auto")
    assert (train_["max_lr"], train_["epochs"], train_["recipe"]) == ("1e-2", None, None)
    sweep = read("sweep --seeds 3:5 --only a b --workers 2")
    assert (sweep["seeds"], sweep["only"], sweep["workers"]) == (range(3, 5), ["a", "b"], 2)
    assert read("sweep")["seeds"] == range(5)
    assert read("sweep --seeds 7")["seeds"] == range(7, 8)
    assert read("bench")["seeds"] == range(1)
    assert read("bench")["repetitions"] == 5
    assert read("audit")["minutes"] == 10.0
    assert read("evaluate")["checkpoint"] is None
    assert read("evaluate a")["checkpoint"] == Path("a")
    assert read("predict a b")["images"] == [Path("a"), Path("b")]
    assert (read("export")["checkpoint"], read("export")["folder"]) == (None, None)
    assert read("export --folder a")["folder"] == Path("a")
    assert read("bench --latency")["latency"]
    notebooks = read("notebooks 03 -p seed 1 --parameter mark b --in-place")
    assert notebooks["parameter"] == [["seed", "1"], ["mark", "b"]]
    assert (notebooks["names"], notebooks["in_place"]) == (["03"], True)


def test_a_mistake_in_a_process_of_its_own_leaves_no_traceback(desk):
    command = [
        sys.executable,
        "-m",
        "mniststudy",
        "predict",
        "text.png",
        "--checkpoint",
        "good.pth",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: text.png cannot be read as a picture")
    assert len(done.stderr.splitlines()) == 1


def test_importing_the_package_does_nothing_else(tmp_path):
    script = """
import json, os, random, signal, sys
import numpy, torch

def process():
    return (
        torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
        torch.get_num_threads(), torch.get_default_dtype(), os.environ.copy(),
        torch.are_deterministic_algorithms_enabled(), signal.getsignal(signal.SIGINT),
    )

before = process()
import mniststudy.cli  # and what it imports before a command is known
assert process() == before
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True,
        cwd=tmp_path, env=os.environ | {"MNISTLIB_RUNS": str(tmp_path / "runs")},
    )  # fmt: skip
    loaded = set(json.loads(done.stdout))
    assert "mnistlib" in loaded
    heavy = {"torchvision", "matplotlib", "pandas", "scipy", "papermill", "sklearn", "seaborn",
             "mlxtend", "torchinfo", "nbformat", "PIL"}  # fmt: skip
    assert not loaded & heavy
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: mnist {command}")
    assert "%%" not in said


def test_the_commands_are_all_explained(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    listed = re.findall(r"^ {4}(\w+)(?: +\w|\n {6,}\w)", said, re.MULTILINE)
    functions = {
        name.removeprefix("do_")
        for name in vars(sys.modules["mniststudy.cli"])
        if name.startswith("do_")
    }
    assert set(listed) == functions
    assert len(functions) == 11
