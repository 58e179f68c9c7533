"""Exported files answer as the checkpoint does, say what they are, and keep no paths."""

import base64
import contextlib
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors

import mnistlib
from mnistlib import CheckpointError, Config, Digits, build, load_mnist, load_model, train
from mnistlib.evaluate import predict_logits
from mnistlib.paths import outputs_folder
from mnistlib.spec import MEAN, STD
from mniststudy.cli import main
from mniststudy.runs.ledger import read_results
from mniststudy.use import card, formats
from mniststudy.use import latency as clock
from mniststudy.use.calibrate import load_calibration
from mniststudy.use.card import model_card
from mniststudy.use.export import export

RELEASED = mnistlib.released_checkpoint()
FOLDER = RELEASED.parent
CALIBRATION = load_calibration(RELEASED)


@pytest.fixture(scope="module")
def few():
    """Return the sample with only 500 of its digits to measure on, which takes less time."""
    sample = load_mnist("sample")
    images, labels = sample.train_images, sample.train_labels
    return Digits(images, labels, images[:500], labels[:500], "sample")


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
    config = Config(model="c8s2 r1 = p full", epochs=1, epoch_images=100, device="cpu", threads=1)
    path = train(config, tiny_digits, folder=folder, verbose=False).checkpoint
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr("mnistlib.load_mnist", lambda *_: tiny_digits)
        assert main(["export", str(path)]) == 0
    return folder, said.getvalue()


def metadata(path: Path) -> dict[str, str]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return file.metadata()
    return {p.key: p.value for p in onnx.load(path).metadata_props}


def page_and_model(path: Path) -> tuple[str, dict]:
    page, model, rest = re.split(r"const MODEL = (\{.*\});", path.read_text(encoding="utf-8"))
    return page + rest, json.loads(model)


def test_the_float_file_answers_as_torch_with_any_number_of_images(few, expected):
    file = (FOLDER / "best.onnx").read_bytes()
    found = formats.measure(file, few.test_images, few.test_labels, expected)
    assert float(found["largest_difference"]) <= 1e-5
    alone = formats.answers_of(file)(few.test_images[3:4])[1][0]
    np.testing.assert_allclose(alone, expected[3], atol=1e-5)


def test_int8_is_small_and_loses_at_most_a_twentieth_of_a_point(few, expected):
    file = (FOLDER / "best-int8.onnx").read_bytes()
    assert len(file) <= 30_000
    assert formats.measure(file, few.test_images, few.test_labels, expected)["changed"] <= 1
    kinds = {node.op_type for node in onnx.load_from_string(file).graph.node}
    assert "QuantizeLinear" in kinds
    assert "QLinearConv" not in kinds
    # what was measured on all of the test set, when it was committed
    row = read_results().query("recipe == 'best' and seed == 0").iloc[0]
    for name in ("best.onnx", "best-int8.onnx"):
        about = metadata(FOLDER / name)
        assert about["measured_on"] == "10,000 test images"
        assert about["config_hash"] == row["config_hash"]
        assert float(about["temperature"]) == CALIBRATION.temperature
        assert abs(int(about["correct"]) / 100 - row["test_accuracy"]) <= 0.05


def test_other_runtimes_find_nothing_in_the_files_that_they_misread():
    for name in ("best.onnx", "best-int8.onnx"):
        model = onnx.load(FOLDER / name)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
        assert not any(a.name == "allowzero" for node in model.graph.node for a in node.attribute)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    quantised = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantised) == 12
    assert all(arrays[n.input[2]].dtype == np.uint8 for n in quantised)
    weights = [v for k, v in arrays.items() if v.dtype == np.int8 and v.ndim == 4]
    assert len(weights) == 7
    assert all(abs(v.astype(int)).max() <= 64 for v in weights)  # seven bits
    (softmax,) = (n for n in model.graph.node if n.op_type == "Softmax")
    (before,) = (n for n in model.graph.node if n.output[0] == softmax.input[0])
    assert before.op_type == "Div"  # of floats


@pytest.mark.parametrize("name", ["best.onnx", "best-int8.onnx", "best.safetensors"])
def test_a_file_says_what_its_user_must_know(name):
    about = metadata(FOLDER / name)
    assert about["labels"].split() == [*"0123456789"]
    assert float(about["threshold"]) == CALIBRATION.sure
    assert "from 0, the background, to 255" in about["input"]
    assert about["licence"] == "MIT"


def test_the_ranges_of_int8_are_measured_on_images_from_all_of_the_set(few, expected):
    # with the range of an empty image, or of the first thousand, most answers would change
    images = torch.cat([torch.zeros_like(few.train_images[:1000]), few.train_images[:1000]])
    file = formats.to_int8((FOLDER / "best.onnx").read_bytes(), images)
    assert formats.measure(file, few.test_images, few.test_labels, expected)["changed"] <= 1


def test_the_measured_values_are_what_they_are_called(monkeypatch):
    p, q = np.e / (np.e + 9), 1 / (np.e + 9)
    seen = np.full((4, 10), q)
    seen[range(4), range(4)] = p
    monkeypatch.setattr(formats, "answers_of", lambda file: lambda images: [None, seen])
    torch_says = seen.copy()
    torch_says[:2] = np.roll(seen[:2], 1, axis=1)
    found = formats.measure(b"", torch.zeros(4), torch.tensor([0, 1, 2, 9]), torch_says)
    assert found == {
        "n": 4, "correct": 3, "changed": 2, "largest_difference": f"{p - q:.1e}",
        "loss": f"{-np.log([p, p, p, q]).mean():.4f}",
        "calibration_error": f"{100 * (3 * (1 - p) + p) / 4:.2f}",
    }  # fmt: skip


def test_nothing_is_written_if_a_file_differs_from_torch_or_the_folder_is_a_file(
    few, tmp_path, monkeypatch
):
    float_file, int8_file = ((FOLDER / f"best{kind}.onnx").read_bytes() for kind in ("", "-int8"))
    monkeypatch.setattr(formats, "to_int8", lambda *_: int8_file)
    monkeypatch.setattr(formats, "to_onnx", lambda *_: int8_file)
    with pytest.raises(CheckpointError, match="answers otherwise than torch"):
        export(RELEASED, few, tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(formats, "to_onnx", lambda *_: float_file)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file cannot be written to .*; name another folder"):
        export(RELEASED, few, tmp_path / "file")


def test_the_committed_files_are_what_export_writes_from_the_committed_checkpoint(exported):
    for name, tolerance in (("best.onnx", 1e-5), ("best-int8.onnx", 1)):
        here, there = (
            {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(f / name).graph.initializer}
            for f in (FOLDER, exported)
        )
        assert here.keys() == there.keys()
        for key, values in here.items():
            # ranges of the int8 file's activations are measured on other digits here
            if name == "best.onnx" or values.dtype == np.int8:
                gap = np.abs(values.astype(float) - there[key])
                assert gap.max() <= tolerance, key
    name = "best.safetensors"
    assert (FOLDER / name).read_bytes() == (exported / name).read_bytes()
    here, there = (page_and_model(folder / "draw.html") for folder in (FOLDER, exported))
    assert here[0] == there[0]
    assert here[1] | {"examples": []} == there[1] | {"examples": []}
    committed = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert committed == model_card(RELEASED), "run `mnist export`"


def test_no_file_holds_a_path_or_a_stack_trace(exported):
    for path in (*exported.iterdir(), *FOLDER.iterdir()):
        if path.suffix != ".pth":
            raw = path.read_bytes()
            for text in (str(outputs_folder().parent), sys.prefix, "stack_trace"):
                assert text.encode() not in raw, f"{text} in {path.name}"


def test_the_weights_are_those_of_the_checkpoint_and_say_whose_they_are():
    with safe_open(FOLDER / "best.safetensors", "pt") as file:
        about, weights = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    expected = load_model(RELEASED).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)
    assert (about["name"], about["parameters"]) == ("best", "13912")
    assert float(about["temperature"]) == CALIBRATION.temperature


def test_the_page_holds_the_network_and_a_training_digit_of_each_class(exported, few):
    _, model = page_and_model(exported / "draw.html")
    network = load_model(RELEASED)
    weights, examples = model.pop("weights"), model.pop("examples")
    assert model == {
        "name": "best", "parameters": 13_912, "mean": MEAN, "std": STD, "eps": network.bn1.eps,
        "temperature": CALIBRATION.temperature, "sure": CALIBRATION.sure,
        "bytes": (exported / "best.safetensors").stat().st_size,
        "smallest": mnistlib.released_checkpoint("tiny").with_name("tiny.tiny").stat().st_size,
    }  # fmt: skip
    state = {k: v for k, v in network.state_dict().items() if v.is_floating_point()}
    assert weights.keys() == state.keys()
    for key, weight in weights.items():
        values = np.frombuffer(base64.b64decode(weight["data"]), "<f4").reshape(weight["shape"])
        np.testing.assert_array_equal(values, state[key].numpy())
    for label, example in enumerate(examples):
        raw = np.frombuffer(base64.b64decode(example["pixels"]), np.uint8).reshape(1, 28, 28)
        (places,) = np.nonzero((few.train_images.numpy() == raw).all((1, 2, 3)))
        assert few.train_labels[places[0]] == example["label"] == label


def test_nothing_in_the_model_can_end_the_script_of_the_page(few):
    about = {"name": "</script>", "parameters": 1, "temperature": 1.0, "sure": 0.8}
    about |= {"bytes": 1, "smallest": 1}
    page = formats.to_page(load_model(RELEASED), about, few)
    assert "</script>" not in re.search(r"const MODEL = (\{.*\});", page)[1]


def test_the_code_in_the_model_card_runs_without_torch_where_it_says_so_and_answers_alike(
    few, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for path in FOLDER.iterdir():
        shutil.copy(path, tmp_path)
    raw = bytes(16) + few.train_images[:10].numpy().tobytes()
    Path("t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw))
    card = Path("MODEL_CARD.md").read_text(encoding="utf-8")
    parts = card.split("## With mnistlib, which needs torch\n")
    alone, whole = ("\n".join(re.findall(r"```python\n(.+?)```", p, re.DOTALL)) for p in parts)
    blocked = f"import sys\nsys.modules['torch'] = sys.modules['mnistlib'] = None\n{alone}"
    command = [sys.executable, "-W", "error", "-c", blocked]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "conv1.weight" in said
    exec(f"{alone}\n{whole}", {})
    said += capsys.readouterr().out
    answers = [re.findall(r"\d", line) for line in re.findall(r"\[.+\]", said)]
    assert answers == [[str(int(label)) for label in few.train_labels[:5]]] * 4


def test_the_card_tells_what_the_ledger_has_of_the_run_and_names_each_file(exported):
    card = (exported / "MODEL_CARD.md").read_text(encoding="utf-8")
    runs = read_results().query("recipe == 'best' and seed < 100")
    own, mean = runs.query("seed == 0").iloc[0], runs["test_accuracy"].mean()
    assert f"- Test accuracy: {own['test_accuracy']:.2f} % of 10,000 images correct (95 %" in card
    assert f"- Test loss: {own['test_loss']:.4f} nats" in card
    assert f"over n = {len(runs)} seeds: {mean:.2f} % [" in card
    blur = read_results("robustness").query("recipe == 'best' and case == 'blur'")
    pairs = zip(blur["severity"], blur["accuracy"], strict=True)
    assert f"| blur      | {', '.join(f'{s:g}: {a:.2f}' for s, a in pairs)} " in card
    letters = read_results("pictures").query("kind == 'letters'").iloc[0]
    assert re.search(rf"\| letters +\| +{letters['n']} \| +0 \| +{letters['wrong']} \|", card)
    for path in exported.glob("*[!d]"):  # all but the card
        raw = path.read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        assert re.search(rf"\| `{path.name}` +\| +{len(raw):,} \| `{digest}` \|", card)


def test_the_card_counts_right_answers_also_where_their_share_is_no_binary_fraction(monkeypatch):
    row = read_results().query("recipe == 'best' and seed == 0").assign(test_accuracy=99.57)
    monkeypatch.setattr(card, "runs_for", lambda config: row)
    assert "99.57 % of 10,000 images correct (" in model_card(RELEASED, FOLDER)


def test_a_network_of_another_kind_gets_no_page_and_the_card_says_what_is_not_known(other):
    folder, said = other
    names = {"custom.onnx", "custom-int8.onnx", "custom.safetensors", "MODEL_CARD.md"}
    assert {path.name for path in folder.glob("[!.]*") if path.suffix != ".pth"} == names
    for name in names:
        assert f"{folder / name}: {(folder / name).stat().st_size:,} bytes\n" in said
    network = build("c8s2 r1 = p full")  # two layers share their weights
    network.load_state_dict(load_safetensors((folder / "custom.safetensors").read_bytes()))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 1, 28, 28), generator=generator, dtype=torch.uint8)
    (path,) = folder.glob("*.pth")
    found, expected = network.eval()(images), load_model(path)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    for text in ("softmax(`logits` / 1.0)", "both are defaults", "no test results of this run."):
        assert text in card


def test_every_runtime_is_timed_on_one_image_and_on_a_thousand(
    other, tiny_digits, runs_folder, monkeypatch
):
    more = iter([True] * (2 * 6 + 5))  # the third round is interrupted
    monkeypatch.setattr(clock.Timer, "autorange", lambda timer: (2 * next(more), timer.timeit(2)))
    monkeypatch.setattr(clock, "load_mnist", lambda source: tiny_digits)
    file = (other[0] / "custom.onnx").read_bytes()
    monkeypatch.setattr(formats, "to_onnx", lambda *_: file)
    asked, answers_of = [], formats.answers_of

    def watched(file):
        answer = answers_of(file)
        return lambda images: asked.append(len(images)) or answer(images)

    monkeypatch.setattr(formats, "answers_of", watched)
    with pytest.raises(StopIteration):
        clock.latency(repetitions=3, networks={"small": build("c8s2 r1 p full")})
    assert asked[:6] == [1] * 3 + [1000] * 3  # once before the clock, and twice
    rows = read_results("latency", runs_folder)
    assert list(rows) == list(read_results("latency"))  # the columns of the committed table
    times = rows.groupby(["network", "runtime", "batch"])["repetition"].agg(list)
    assert times.tolist() == [[1, 2]] * 6
    assert (rows["seconds"] > 0).all()
    # torch has no file, and that of integers is the smaller one
    sizes = rows.groupby("runtime")["bytes"].max()
    assert np.isnan(sizes["torch"])
    assert 2_000 < sizes["onnxruntime int8"] < sizes["onnxruntime"]


FOREIGN = """
class Core:
    def compile_model(self, file, device, options):
        assert options == {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        assert open(file, "rb").read()
        return lambda images: images.mean()


__version__ = "9.9.9-of-tests"
"""


def test_openvino_is_timed_in_an_environment_of_its_own_in_the_same_rounds(
    other, tiny_digits, runs_folder, monkeypatch, tmp_path
):
    (tmp_path / "openvino.py").write_text(FOREIGN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(clock.Timer, "autorange", lambda timer: (1, timer.timeit(1)))
    monkeypatch.setattr(clock, "load_mnist", lambda source: tiny_digits)
    file = (other[0] / "custom.onnx").read_bytes()
    monkeypatch.setattr(formats, "to_onnx", lambda *_: file)
    networks = {"small": build("c8s2 r1 p full")}
    clock.latency(repetitions=1, networks=networks, openvino=sys.executable)
    rows = read_results("latency", runs_folder)
    assert set(rows["runtime"]) == {
        *("torch", "onnxruntime", "onnxruntime int8", "OpenVINO 9.9.9", "OpenVINO 9.9.9 int8")
    }
    assert (rows["seconds"] > 0).all()
