"""Exported files answer as the checkpoint does, say what they are, and keep no paths."""

import base64
import contextlib
import hashlib
import io
import json
import re
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
from mniststudy.runs import report
from mniststudy.runs.ledger import read_results
from mniststudy.use import formats
from mniststudy.use import latency as clock
from mniststudy.use.calibrate import load_calibration
from mniststudy.use.card import model_card
from mniststudy.use.export import export

RELEASED = released_checkpoint()
FOLDER = RELEASED.parent
CALIBRATION = load_calibration(RELEASED)


@pytest.fixture(scope="module")
def few():
    """Return the digits with only 500 of them to measure on, which takes less time."""
    with warnings.catch_warnings(action="ignore"):
        digits = load_mnist()
    images, labels = digits.test or (digits.train_images, digits.train_labels)
    train_set = digits.train_images, digits.train_labels
    return Digits(*train_set, images[:500], labels[:500], digits.source)


@pytest.fixture(scope="module")
def expected(few):
    """Return torch's probabilities `(500, 10)`."""
    logits = predict_logits(load_model(RELEASED), few.test_images)
    return (logits / CALIBRATION.temperature).softmax(1).numpy()


@pytest.fixture(scope="module")
def exported(few, tmp_path_factory):
    """Return a folder with the files of the released checkpoint, exported once for all tests."""
    folder = tmp_path_factory.mktemp("exported")
    assert {p.name for p in export(RELEASED, few, folder)} == {p.name for p in folder.iterdir()}
    return folder


@pytest.fixture(scope="module")
def other(tiny_digits, tmp_path_factory):
    """Return the exported folder of a run with a network of its own, and what the command said."""
    folder = tmp_path_factory.mktemp("other")
    config = Config(model="c8s2 r1 p full", epochs=1, epoch_images=100, device="cpu", threads=1)
    path = train(config, tiny_digits, folder=folder, verbose=False).checkpoint
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr("mnistlib.load_mnist", lambda *_: tiny_digits)
        assert main(["export", str(path)]) == 0
    return folder, said.getvalue()


def tensors(file: bytes) -> dict[str, np.ndarray]:
    model = onnx.load_from_string(file)
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def metadata(path: Path) -> dict[str, str]:
    return {p.key: p.value for p in onnx.load(path).metadata_props}


def model_in(path: Path) -> dict:
    return json.loads(re.search(r"const MODEL = (\{.*\});", path.read_text(encoding="utf-8"))[1])


# Parity


def test_the_float_file_answers_as_torch_with_any_number_of_images(few, expected):
    file = (FOLDER / "best.onnx").read_bytes()
    found = formats.measure(file, few.test_images, few.test_labels, expected)
    assert float(found["largest_difference"]) <= 1e-5
    assert found["changed"] == 0
    answer = formats.answers_of(file)
    for i in range(3):
        alone = answer(few.test_images[i : i + 1])[1][0]
        np.testing.assert_allclose(alone, expected[i], atol=1e-5)


def test_a_file_that_differs_from_torch_is_not_written(few, tmp_path, monkeypatch):
    """One weight of the last convolution is changed by a hundredth."""
    model = onnx.load(FOLDER / "best.onnx")
    (weight,) = (t for t in model.graph.initializer if t.name.endswith("conv6.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[3, 5, 3, 3] += 0.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    monkeypatch.setattr(formats, "to_onnx", lambda *_: model.SerializeToString())
    monkeypatch.setattr(formats, "to_int8", lambda *_: b"")
    with pytest.raises(CheckpointError, match="answers otherwise than torch"):
        export(RELEASED, few, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_int8_is_small_and_loses_at_most_a_twentieth_of_a_point(few, expected):
    file = (FOLDER / "best-int8.onnx").read_bytes()
    assert len(file) <= 30_000
    found = formats.measure(file, few.test_images, few.test_labels, expected)
    assert found["changed"] <= 1
    kinds = {node.op_type for node in onnx.load_from_string(file).graph.node}
    assert "QLinearConv" in kinds
    assert "Conv" not in kinds
    # what was measured on all of the test set, when it was committed
    row = read_results().query("recipe == 'best' and seed == 0").iloc[0]
    for name in ("best.onnx", "best-int8.onnx"):
        about = metadata(FOLDER / name)
        assert about["measured_on"] == "10,000 test images"
        assert about["config_hash"] == row["config_hash"]
        assert float(about["temperature"]) == CALIBRATION.temperature
        assert abs(int(about["correct"]) / 100 - row["test_accuracy"]) <= 0.05
    assert int(metadata(FOLDER / "best.onnx")["changed"]) == 0


def test_the_measured_values_are_what_they_are_called(monkeypatch):
    p, q = np.e / (np.e + 9), 1 / (np.e + 9)
    seen = np.full((4, 10), q)
    seen[range(4), range(4)] = p
    monkeypatch.setattr(formats, "answers_of", lambda file: lambda images: [None, seen])
    torch_says = seen.copy()
    torch_says[0] = np.roll(seen[0], 1)
    found = formats.measure(b"", torch.zeros(4), torch.tensor([0, 1, 2, 9]), torch_says)
    assert found == {
        "n": 4, "correct": 3, "changed": 1, "largest_difference": f"{p - q:.1e}",
        "loss": f"{-np.log([p, p, p, q]).mean():.4f}",
        "calibration_error": f"{100 * (3 * (1 - p) + p) / 4:.2f}",
    }  # fmt: skip


# What is committed


def test_the_committed_files_are_what_export_writes_from_the_committed_checkpoint(exported, few):
    name = "best.safetensors"
    assert (FOLDER / name).read_bytes() == (exported / name).read_bytes()
    for name in ("best.onnx", "best-int8.onnx"):
        here, there = (tensors((folder / name).read_bytes()) for folder in (FOLDER, exported))
        assert here.keys() == there.keys()
        for key, values in here.items():
            # ranges of the activations are measured on other digits where there is no MNIST
            if values.dtype == np.int8:
                assert abs(values.astype(int) - there[key]).max() <= 1, key
            elif name == "best.onnx" or (few.source == "mnist" and values.dtype == np.float32):
                tolerance = 1e-5 if name == "best.onnx" else 1e-3
                np.testing.assert_allclose(values, there[key], tolerance, 1e-7, err_msg=key)
    if few.source == "mnist":
        assert (FOLDER / "draw.html").read_text() == (exported / "draw.html").read_text()


def test_the_committed_model_card_is_what_the_ledger_and_the_files_say():
    committed = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert committed == model_card(RELEASED), "run `mnist export`"


# What the files say of themselves


def test_no_file_holds_a_path_or_a_stack_trace(exported):
    for path in (*exported.iterdir(), *FOLDER.iterdir()):
        if path.suffix != ".pth":
            raw = path.read_bytes()
            for text in (str(outputs_folder().parent), sys.prefix, "stack_trace"):
                assert text.encode() not in raw, f"{text} in {path.name}"


def test_the_weights_are_those_of_the_checkpoint_and_say_whose_they_are(exported):
    with safe_open(exported / "best.safetensors", "pt") as file:
        about, weights = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    expected = load_model(RELEASED).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)
    assert (about["name"], about["parameters"]) == ("best", "13912")
    assert float(about["temperature"]) == CALIBRATION.temperature


def test_the_page_holds_the_network_and_a_training_digit_of_each_class(exported, few):
    model, network = model_in(exported / "draw.html"), load_model(RELEASED)
    assert {k: v for k, v in model.items() if k not in ("weights", "examples")} == {
        "name": "best", "parameters": 13_912, "mean": MEAN, "std": STD, "eps": network.bn1.eps,
        "temperature": CALIBRATION.temperature, "sure": CALIBRATION.sure,
    }  # fmt: skip
    state = network.state_dict()
    assert model["weights"].keys() == {k for k in state if not k.endswith("num_batches_tracked")}
    for key, weight in model["weights"].items():
        values = np.frombuffer(base64.b64decode(weight["data"]), "<f4").reshape(weight["shape"])
        np.testing.assert_array_equal(values, state[key].numpy())
    for label, example in enumerate(model["examples"]):
        raw = np.frombuffer(base64.b64decode(example["pixels"]), np.uint8).reshape(1, 28, 28)
        (places,) = np.nonzero((few.train_images.numpy() == raw).all((1, 2, 3)))
        assert few.train_labels[places[0]] == example["label"] == label


def test_nothing_in_the_model_can_end_the_script_of_the_page(few):
    about = {"name": "</script>", "parameters": 1, "temperature": 1.0, "sure": 0.8}
    page = formats.to_page(load_model(RELEASED), about, few)
    assert "</script>" not in re.search(r"const MODEL = (\{.*\});", page)[1]


# The model card


def test_the_code_in_the_model_card_runs_and_all_files_give_the_same_digits(monkeypatch):
    monkeypatch.chdir(FOLDER)
    card = Path("MODEL_CARD.md").read_text(encoding="utf-8")
    said = io.StringIO()
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(said):
        exec("\n".join(re.findall(r"```python\n(.+?)```", card, re.DOTALL)), {})
    answers = [re.findall(r"\d", line) for line in said.getvalue().splitlines()[-3:]]
    assert len(answers[0]) == 5
    assert answers[0] == answers[1] == answers[2]


def test_the_card_names_size_and_checksum_of_each_file(exported):
    card = (exported / "MODEL_CARD.md").read_text(encoding="utf-8")
    for path in exported.iterdir():
        if path.name != "MODEL_CARD.md":
            raw = path.read_bytes()
            digest = hashlib.sha256(raw).hexdigest()
            assert re.search(rf"\| `{path.name}` +\| +{len(raw):,} \| `{digest}` \|", card)


def test_the_card_tells_what_the_ledger_has_of_the_run():
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
    changed = read_results("robustness").query("recipe == 'best' and case == 'blur'")
    pairs = zip(changed["severity"], changed["accuracy"], strict=True)
    assert f"| blur      | {', '.join(f'{s:g}: {a:.2f}' for s, a in pairs)} " in card
    letters = read_results("pictures").query("kind == 'letters'").iloc[0]
    assert re.search(rf"\| letters +\| +{letters['n']} \| +0 \| +{letters['wrong']} \|", card)


def test_a_network_of_another_kind_gets_no_page_and_the_card_says_what_is_not_known(other):
    folder, said = other
    files = {p.name: p for p in folder.iterdir() if p.suffix != ".pth"}
    assert files.keys() == {
        "custom.onnx",
        "custom-int8.onnx",
        "custom.safetensors",
        "MODEL_CARD.md",
    }
    for path in files.values():
        assert f"{path}: {path.stat().st_size:,} bytes\n" in said
    card = files["MODEL_CARD.md"].read_text(encoding="utf-8")
    assert "softmax(`logits` / 1.0)" in card
    assert "they were not fitted" in card
    assert "The ledger has no test results of this run." in card


# Errors


def test_without_the_extra_it_is_named_before_any_work(capsys, monkeypatch):
    monkeypatch.setenv("MNISTLIB_DATA", "unset")  # an error of its own, if it is read
    for missing in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            assert main(["export"]) == 1
        said = capsys.readouterr().err
        assert said == f"error: {missing} is not installed: pip install 'mnistlib[export]'\n"


def test_a_folder_that_is_a_file_is_named(few, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for kind, name in (("to_onnx", "best.onnx"), ("to_int8", "best-int8.onnx")):
        monkeypatch.setattr(formats, kind, lambda *_, file=name: (FOLDER / file).read_bytes())
    with pytest.raises(CheckpointError, match=r"file cannot be written to .*; name another folder"):
        export(RELEASED, few, tmp_path / "file")


# Latency


def test_every_runtime_is_timed_on_one_image_and_on_a_thousand(
    other, tiny_digits, runs_folder, monkeypatch
):
    monkeypatch.setattr(clock.Timer, "autorange", lambda timer: (2, timer.timeit(2)))
    monkeypatch.setattr(clock, "load_mnist", lambda source: tiny_digits)
    file = (other[0] / "custom.onnx").read_bytes()
    monkeypatch.setattr(formats, "to_onnx", lambda *_: file)
    path = clock.latency(repetitions=2, networks={"small": build("c8s2 r1 p full")})
    assert path == runs_folder / "latency.csv"
    rows = read_results("latency", path.parent)
    assert list(rows) == list(read_results("latency"))  # the columns of the committed table
    times = rows.groupby(["network", "runtime", "batch"])["repetition"].agg(list)
    assert times.tolist() == [[1, 2]] * 6
    assert set(rows["runtime"]) == {"torch", "onnxruntime", "onnxruntime int8"}
    assert (rows["seconds"] > 0).all()
    # torch has no file, and that of integers is the smaller one
    sizes = rows.groupby("runtime")["bytes"].max()
    assert np.isnan(sizes["torch"])
    assert 2_000 < sizes["onnxruntime int8"] < sizes["onnxruntime"]
    assert len(report.latency(path.parent).splitlines()) == 4


def test_the_readme_compares_answers_within_a_round(tmp_path):
    """Rounds on a busy machine are slower for all, so ratios are taken round by round."""
    rows = [
        ("go", network, runtime, batch, round_, 10, 10 * batch * round_ * seconds, 7)
        for network, seconds in (("best", 0.001), ("keras", 0.003))
        for runtime in ("torch", "onnxruntime", "onnxruntime int8")
        for batch in (1, 1000)
        for round_ in (1, 2, 3)
    ]
    columns = ["go", "network", "runtime", "batch", "repetition", "calls", "seconds", "parameters"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "latency.csv", index=False)
    table = [re.sub(" +", " ", line) for line in report.latency(tmp_path).splitlines()]
    theirs = 3 * "| 6,000 (3,000 to 9,000) "
    assert f"| 1 | `keras` | 7 {theirs}| 3.00 (3.00 to 3.00) |" in table
    assert f"| 1,000 | `best` | 7 {3 * '| 2,000 (1,000 to 3,000) '}| 1 |" in table
