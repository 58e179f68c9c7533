"""Exported files answer as the checkpoint does, say what they are, and keep no paths."""

import base64
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from safetensors import safe_open

from mnistlib import (
    CheckpointError,
    Config,
    ConfigError,
    Digits,
    Evaluation,
    build,
    load_mnist,
    load_model,
    released_checkpoint,
    train,
)
from mnistlib.evaluate import predict_logits
from mnistlib.paths import outputs_folder
from mnistlib.spec import MEAN, STD
from mniststudy.cli import main
from mniststudy.figures import export as study
from mniststudy.figures.speed import example_networks
from mniststudy.runs import report
from mniststudy.runs.ledger import LedgerError, read_results
from mniststudy.use import formats as export_formats
from mniststudy.use.export import export, latency, model_card
from mniststudy.use.formats import measure, run_onnx, to_onnx, to_page

RELEASED = released_checkpoint()
FOLDER = RELEASED.parent
CALIBRATION = study.read_calibration(RELEASED)
EXTRA = ("onnx", "onnxscript", "onnxruntime", "safetensors")


@pytest.fixture(scope="module")
def digits():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_mnist()


@pytest.fixture(scope="module")
def seen(digits):
    """Return images, labels and torch's probabilities: of the test set, or of the sample."""
    images, labels = digits.test or (digits.train_images, digits.train_labels)
    logits = predict_logits(load_model(RELEASED), images)
    return images, labels, (logits / CALIBRATION["temperature"]).softmax(1).numpy()


@pytest.fixture(scope="module")
def few(digits):
    """Return the digits with only 200 of them to measure on, which takes less time."""
    images, labels = digits.test or (digits.train_images, digits.train_labels)
    train_set = digits.train_images, digits.train_labels
    return Digits(*train_set, images[:200], labels[:200], digits.source)


@pytest.fixture(scope="module")
def exported(few, tmp_path_factory):
    """Return a folder with the files of the released checkpoint, exported once for all tests."""
    folder = tmp_path_factory.mktemp("exported")
    assert {p.name for p in export(RELEASED, few, folder)} == {p.name for p in folder.iterdir()}
    return folder


@pytest.fixture(scope="module")
def other(tiny_digits, tmp_path_factory):
    """Return the exported folder of a run with a network of its own and no calibration."""
    folder = tmp_path_factory.mktemp("other")
    config = Config(model="c8s2 r1 p full", epochs=1, epoch_images=100, device="cpu", threads=1)
    path = train(config, tiny_digits, folder=folder, verbose=False).checkpoint
    export(path, tiny_digits)
    return folder


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def metadata(path: Path) -> dict[str, str]:
    return {p.key: p.value for p in onnx.load(path).metadata_props}


def nudged(file: bytes) -> bytes:
    """Return an ONNX file with one weight of the last convolution changed by a hundredth."""
    model = onnx.load_from_string(file)
    (weight,) = (t for t in model.graph.initializer if t.name.endswith("conv6.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[3, 5, 3, 3] += 0.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    return model.SerializeToString()


# Parity


def test_the_float_file_answers_as_torch_on_every_image(seen):
    _, probabilities = run_onnx((FOLDER / "best.onnx").read_bytes(), seen[0])
    assert abs(probabilities - seen[2]).max() <= 1e-5
    np.testing.assert_array_equal(probabilities.argmax(1), seen[2].argmax(1))


def test_a_changed_weight_is_noticed(seen):
    found = measure(nudged((FOLDER / "best.onnx").read_bytes()), *(part[:200] for part in seen))
    assert float(found["largest_difference"]) > 1e-5


def test_a_file_that_differs_from_torch_is_not_written(few, tmp_path, monkeypatch):
    file = nudged((FOLDER / "best.onnx").read_bytes())
    monkeypatch.setattr(export_formats, "to_onnx", lambda *_: file)
    with pytest.raises(CheckpointError, match="answers otherwise than torch"):
        export(RELEASED, few, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_int8_is_small_and_loses_at_most_a_twentieth_of_a_point(seen, digits):
    file = (FOLDER / "best-int8.onnx").read_bytes()
    assert len(file) <= 30_000
    found = measure(file, *seen)
    correct = int((seen[2].argmax(1) == seen[1].numpy()).sum())
    assert 100 * (correct - found["correct"]) / found["n"] <= 0.05
    assert found["changed"] <= (10 if digits.source == "mnist" else 5)
    kinds = {node.op_type for node in onnx.load_from_string(file).graph.node}
    assert "QLinearConv" in kinds
    assert "Conv" not in kinds


class Pixels(torch.nn.Module):
    """The logit of a digit is the pixel of that number."""

    def forward(self, pixels):
        return pixels.flatten(1)[:, :10].float()


def test_the_measured_values_are_what_they_are_called():
    images = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    images[range(4), 0, 0, [0, 1, 2, 3]] = 2
    file = to_onnx(Pixels(), 2.0)
    logits, probabilities = run_onnx(file, images)
    p = np.e / (np.e + 9)
    np.testing.assert_allclose(logits.max(1), 2)
    np.testing.assert_allclose(probabilities.max(1), p, rtol=1e-6)
    expected = probabilities.copy()
    expected[0] = np.roll(expected[0], 1)
    found = measure(file, images, torch.tensor([0, 1, 2, 9]), expected)
    assert found == {
        "n": 4, "correct": 3, "changed": 1, "largest_difference": f"{p - 1 / (np.e + 9):.1e}",
        "loss": f"{-np.log([p, p, p, p / np.e]).mean():.4f}",
        "calibration_error": f"{100 * (3 * (1 - p) + p) / 4:.2f}",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["best.onnx", "best-int8.onnx"])
def test_any_number_of_images_is_read(seen, name):
    file = (FOLDER / name).read_bytes()
    (model_input,) = onnx.load_from_string(file).graph.input
    assert model_input.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    many = run_onnx(file, seen[0][:7])[1]
    for i in range(7):
        np.testing.assert_allclose(run_onnx(file, seen[0][i : i + 1])[1][0], many[i], atol=1e-6)


# What is committed


def test_the_committed_files_are_what_export_writes_from_the_committed_checkpoint(exported, digits):
    name = "best.safetensors"
    assert (FOLDER / name).read_bytes() == (exported / name).read_bytes()
    here, there = tensors(FOLDER / "best.onnx"), tensors(exported / "best.onnx")
    assert here.keys() == there.keys()
    for key, values in here.items():
        np.testing.assert_allclose(values, there[key], rtol=1e-5, atol=1e-7, err_msg=key)
    here, there = tensors(FOLDER / "best-int8.onnx"), tensors(exported / "best-int8.onnx")
    for key, values in here.items():
        if values.dtype == np.int8:  # ranges of the activations are measured on other digits here
            assert abs(values.astype(int) - there[key]).max() <= 1, key
        elif digits.source == "mnist" and values.dtype == np.float32:
            np.testing.assert_allclose(values, there[key], rtol=1e-3, err_msg=key)
    kept = model_in(FOLDER / "draw.html")
    made = model_in(exported / "draw.html")
    assert kept["weights"] == made["weights"]
    if digits.source == "mnist":
        assert (FOLDER / "draw.html").read_text() == (exported / "draw.html").read_text()


def test_the_committed_model_card_is_what_the_ledger_and_the_files_say():
    committed = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert committed == model_card(RELEASED, CALIBRATION), "run `mnist export`"


def test_the_committed_files_were_measured_on_the_whole_test_set():
    row = read_results().query("recipe == 'best' and seed == 0").iloc[0]
    for name in ("best.onnx", "best-int8.onnx"):
        about = metadata(FOLDER / name)
        assert about["measured_on"] == "10,000 test images"
        assert about["config_hash"] == row["config_hash"]
        assert float(about["temperature"]) == CALIBRATION["temperature"]
        assert abs(int(about["correct"]) / 100 - row["test_accuracy"]) <= 0.05
    assert int(metadata(FOLDER / "best.onnx")["changed"]) == 0


# What the files say of themselves


def test_no_file_holds_a_path_or_a_stack_trace(exported):
    for path in (*exported.iterdir(), *FOLDER.iterdir()):
        if path.suffix != ".pth":
            raw = path.read_bytes()
            for text in (str(Path(study.__file__).parents[2]), sys.prefix, "stack_trace"):
                assert text.encode() not in raw, f"{text} in {path.name}"


def test_without_the_stripping_a_path_would_be_there(monkeypatch):
    monkeypatch.setattr(export_formats, "_strip", lambda message: None)
    assert str(Path(study.__file__).parents[2]).encode() in to_onnx(Pixels(), 1.0)


def test_the_weights_are_those_of_the_checkpoint_and_say_whose_they_are(exported):
    with safe_open(exported / "best.safetensors", "pt") as file:
        about, weights = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    expected = load_model(RELEASED).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)
    assert about["name"] == "best"
    assert about["parameters"] == "13912"
    assert float(about["temperature"]) == CALIBRATION["temperature"]


# The page


def model_in(path: Path) -> dict:
    return json.loads(re.search(r"const MODEL = (\{.*\});", path.read_text(encoding="utf-8"))[1])


def test_the_page_holds_the_network_and_a_training_digit_of_each_class(exported, few):
    model, network = model_in(exported / "draw.html"), load_model(RELEASED)
    assert (exported / "draw.html").stat().st_size <= 300_000
    assert {k: model[k] for k in ("name", "parameters", "mean", "std", "eps")} == {
        "name": "best", "parameters": 13_912, "mean": MEAN, "std": STD, "eps": network.bn1.eps,
    }  # fmt: skip
    for key in ("temperature", "sure", "evidence"):
        assert model[key] == CALIBRATION[key]
    state = network.state_dict()
    assert model["weights"].keys() == {k for k in state if not k.endswith("num_batches_tracked")}
    for key, weight in model["weights"].items():
        values = np.frombuffer(base64.b64decode(weight["data"]), "<f4").reshape(weight["shape"])
        np.testing.assert_array_equal(values, state[key].numpy())
    assert [example["label"] for example in model["examples"]] == list(range(10))
    for example in model["examples"]:
        raw = np.frombuffer(base64.b64decode(example["pixels"]), np.uint8).reshape(1, 28, 28)
        (places,) = np.nonzero((few.train_images.numpy() == raw).all((1, 2, 3)))
        assert few.train_labels[places[0]] == example["label"]


def test_nothing_in_the_model_can_end_the_script_of_the_page(few):
    about = CALIBRATION | {"name": "</script>", "parameters": 1}
    page = to_page(load_model(RELEASED), about, few)
    assert "</script>" not in re.search(r"const MODEL = (\{.*\});", page)[1]


def test_a_network_of_another_kind_gets_no_page_and_the_card_says_so(other):
    assert {p.name for p in other.iterdir() if p.suffix != ".pth"} == {
        "custom.onnx", "custom-int8.onnx", "custom.safetensors", "MODEL_CARD.md",
    }  # fmt: skip
    card = (other / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "There is no page to draw on" in card
    assert "softmax(`logits` / 1.0)" in card
    assert "they were not fitted" in card
    assert "The ledger has no test results of this run." in card


# The model card


def test_the_code_in_the_model_card_runs_and_all_files_give_the_same_digits():
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.+?)```", card, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    answers = [re.findall(r"\d", line) for line in done.stdout.splitlines()[-3:]]
    assert len(answers[0]) == 5
    assert answers[0] == answers[1] == answers[2]


def test_the_card_names_size_and_checksum_of_each_file(exported):
    import hashlib

    card = (exported / "MODEL_CARD.md").read_text(encoding="utf-8")
    for path in exported.iterdir():
        if path.name != "MODEL_CARD.md":
            raw = path.read_bytes()
            digest = hashlib.sha256(raw).hexdigest()
            assert f"| `{path.name}` | {len(raw):,} | `{digest}` |" in card


@pytest.fixture
def ledger(tmp_path):
    """Return a copy of the ledger's folder, with small tables of what other studies measured."""
    folder = tmp_path / "outputs" / "results"
    shutil.copytree(outputs_folder() / "results", folder, ignore=shutil.ignore_patterns("*/"))
    rows = [("rotation", s, r, 99.5 - s / 10, 10_000) for s in (0, 10) for r in ("best", "fast")]
    columns = ["case", "severity", "recipe", "accuracy", "n"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "robustness.csv", index=False)
    pictures = pd.DataFrame({"case": ["letters", "blank"], "n": [2000, 1000], "bad": [3.5, None]})
    pictures.to_csv(folder / "pictures.csv", index=False)
    times = [
        ("go", network, runtime, batch, repetition, 10, batch * seconds * repetition, 7)
        for network, seconds in (("best", 0.01), ("keras", 0.03))
        for runtime in ("torch", "onnxruntime", "onnxruntime int8")
        for batch in (1, 1000)
        for repetition in (1, 2, 3)
    ]
    columns = ["go", "network", "runtime", "batch", "repetition", "calls", "seconds", "parameters"]
    pd.DataFrame(times, columns=columns).to_csv(folder / "latency.csv", index=False)
    return folder


def test_the_card_tells_what_other_studies_measured(ledger):
    card = model_card(RELEASED, CALIBRATION, ledger=ledger)
    assert "| rotation | 0: 99.50, 10: 98.50 |" in card
    assert "| letters | 2,000 | 3.5 |\n| blank | 1,000 |  |" in card
    assert "## Robustness\n" in card
    (ledger / "robustness.csv").unlink()
    card = model_card(RELEASED, CALIBRATION, ledger=ledger)
    assert "rotation" not in card
    assert "| letters | 2,000 | 3.5 |" in card
    (ledger / "pictures.csv").unlink()
    assert "Robustness" not in model_card(RELEASED, CALIBRATION, ledger=ledger)


def test_the_card_tells_what_the_ledger_has_of_the_run(exported, tmp_path):
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    runs = read_results().query("recipe == 'best' and seed < 100")
    own, wrong = runs.query("seed == 0").iloc[0], read_results("misread")
    (ids,) = wrong[wrong["config_hash"] == own["config_hash"]]["wrong"].str.split()
    seen = Evaluation(own["test_loss"], 10_000 - len(ids), 10_000)
    assert f"- Test accuracy: {seen}.\n- Test loss: {own['test_loss']:.4f} nats" in card
    late = sum(int(i) >= 5000 for i in ids)
    assert f"- Errors: {len(ids) - late} in the first half of the test images, {late} in" in card
    mean = runs["test_accuracy"].mean()
    assert f"over n = {len(runs)} seeds: {mean:.2f} % [" in card
    # a run from before misclassified images were listed has no line on them
    reference = released_checkpoint("reference")
    for name in ("", "-int8"):
        shutil.copy(exported / f"best{name}.onnx", tmp_path / f"reference{name}.onnx")
    card = model_card(reference, study.read_calibration(reference), tmp_path)
    assert "- Test accuracy: 99.47 % of 10,000 images correct" in card
    assert "- Errors:" not in card


def test_the_card_tells_how_temperature_and_thresholds_were_fitted():
    fitted = {"temperature": 0.7, "sure": 0.9, "evidence": 4.5, "twin": {"split": "writers"}}
    card = model_card(RELEASED, fitted)
    assert "softmax(`logits` / 0.7)" in card
    assert "largest probability is below 0.9 is *not sure*" in card
    assert "is below 4.5 is *not a digit*" in card
    assert "fitted on the validation images of a second network" in card
    assert "(split writers)" in card


def test_a_calibration_of_another_checkpoint_is_not_used(tmp_path):
    about = {"checkpoint": "another.pth", "temperature": 9.0, "sure": 0.1, "evidence": 1.0}
    (tmp_path / "calibration.json").write_text(json.dumps(about))
    assert study.read_calibration(tmp_path / "a.pth")["temperature"] == 1.0
    assert study.read_calibration(tmp_path / "another.pth") == about
    (tmp_path / "calibration.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"json is damaged .* mnistlib calibrate$"):
        study.read_calibration(tmp_path / "another.pth")


# Errors


@pytest.mark.parametrize("missing", EXTRA)
def test_without_the_extra_it_is_named_before_any_work(capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setenv("MNISTLIB_DATA", "unset")  # an error of its own, if it is read
    for command in (["export"], ["bench", "--latency"]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert said == f"error: {missing} is not installed: pip install 'mnistlib[export]'\n"


def test_a_folder_that_is_a_file_is_named(exported, few, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(export_formats, "to_onnx", lambda *_: (exported / "best.onnx").read_bytes())
    with pytest.raises(CheckpointError, match=r"file cannot be written to .*; name another folder"):
        export(RELEASED, few, tmp_path / "file")


def test_the_command_writes_beside_the_checkpoint_or_into_a_folder(
    other, tiny_digits, tmp_path, capsys, monkeypatch
):
    (checkpoint,) = other.glob("*.pth")
    monkeypatch.setattr("mnistlib.load_mnist", lambda: tiny_digits)
    assert main(["export", str(checkpoint), "--folder", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    for path in (tmp_path / "new").iterdir():
        assert f"{path}: {path.stat().st_size:,} bytes\n" in said
        if path.suffix != ".md":  # the card lists the checkpoint only where it lies beside it
            # the same bytes again
            assert path.read_bytes() == (other / path.name).read_bytes()


# Latency


def test_every_runtime_is_timed_on_one_image_and_on_a_thousand(
    tiny_digits, runs_folder, capsys, monkeypatch
):
    monkeypatch.setattr(study.Timer, "autorange", lambda timer: (2, timer.timeit(2)))
    networks = {"small": build("c8s2p full")}
    path = latency(networks, tiny_digits, repetitions=2)
    rows = read_results("latency", path.parent)
    assert path == runs_folder / "latency.csv"
    assert tuple(rows) == study.LATENCY_COLUMNS
    times = rows.groupby(["network", "runtime", "batch"])["repetition"].agg(list)
    assert times.tolist() == [[1, 2]] * 6
    assert set(rows["runtime"]) == {"torch", "onnxruntime", "onnxruntime int8"}
    assert (rows["seconds"] > 0).all()
    assert (rows["threads"] == 1).all()
    # torch has no file, and that of integers is the smaller one
    sizes = rows.groupby("runtime")["bytes"].max()
    assert np.isnan(sizes["torch"])
    assert 3_000 < sizes["onnxruntime int8"] < sizes["onnxruntime"]
    assert len(report.latency(path.parent).splitlines()) == 4
    assert capsys.readouterr().out.count("\n") == 12
    with pytest.raises(ConfigError, match="--repetitions is 0, but it must be at least 1"):
        latency(networks, tiny_digits, repetitions=0)


def test_the_command_times_the_released_network_and_both_examples(
    tiny_digits, tmp_path, monkeypatch
):
    asked = {}
    monkeypatch.setattr("mnistlib.load_mnist", lambda source: tiny_digits)
    monkeypatch.setattr(study, "latency", lambda *a: asked.update(zip("ndfr", a, strict=True)))
    assert main(["bench", "--latency", "--repetitions", "3", "--ledger", str(tmp_path)]) == 0
    assert (asked["f"], asked["r"]) == (tmp_path, 3)
    counts = {name: sum(p.numel() for p in n.parameters()) for name, n in asked["n"].items()}
    assert counts == {"best": 13_912, "keras": 34_826, "pytorch": 1_199_882}
    assert list(asked["n"]) == ["best", *example_networks()]
    pixels = tiny_digits.train_images[:2]
    for network in asked["n"].values():
        network.eval()
        assert network(pixels).shape == (2, 10)
    keras = asked["n"]["keras"]
    assert torch.equal(keras(pixels), torch.nn.Sequential.forward(keras, pixels.float() / 255))


def test_the_table_of_latency_is_taken_within_rounds(ledger):
    rows = report.latency(ledger).splitlines()
    assert rows[0].endswith("| onnxruntime's time in times that of `best` |")
    for row, batch in ((2, "1"), (4, "1,000")):
        ours, theirs = 3 * "| 2,000 (1,000 to 3,000) ", 3 * "| 6,000 (3,000 to 9,000) "
        assert rows[row] == f"| {batch} | `best` | 7 {ours}| 1 |"
        assert rows[row + 1] == f"| {batch} | `keras` | 7 {theirs}| 3.00 (3.00 to 3.00) |"


def test_the_readme_has_the_table_of_latency_where_it_was_measured(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "outputs_folder", lambda: ledger.parent)
    names = ("headline", "speed", "promises", "leaderboard", "latency")
    for name in names:
        monkeypatch.setattr(report, name, lambda name=name: f"the table {name}")
    marks = [f"{report.BEGIN.format(name)}\n{report.END.format(name)}\n" for name in names]
    readme = tmp_path / "README.md"
    readme.write_text("".join(marks[:4]), encoding="utf-8")
    with pytest.raises(LedgerError, match="must have the marks <!-- latency begin"):
        report.write_report(readme=readme)
    readme.write_text("".join(marks), encoding="utf-8")
    assert report.write_report(readme=readme)
    assert "the table latency" in readme.read_text(encoding="utf-8")
    (ledger / "latency.csv").unlink()
    readme.write_text("".join(marks[:4]), encoding="utf-8")
    assert report.write_report(readme=readme)
    assert "the table leaderboard" in readme.read_text(encoding="utf-8")
