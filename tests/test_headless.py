"""Notebooks without a screen: bad parameters start no kernel, and what is committed is clean."""

import base64
import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import papermill
import pytest
from faults import tries
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from mnistlib import ConfigError, headless, train
from mnistlib.__main__ import main
from mnistlib.headless import (
    check_parameters,
    clean_notebook,
    execute_in_place,
    extract_figures,
    find_notebooks,
    run_notebooks,
)
from mnistlib.resume import checkpoints
from mnistlib.summary import summarise

KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
PARAMETERS = (
    'epochs = 1\nmax_lr = 0.01\nrecipe = "fast"\nmark = "a"\nseed = None\n'
    "rows = 3\nshare = 0.5\nquiet = True\nhalf = 1 / 2"
)


def png() -> str:
    """Return a small picture as a notebook holds it."""
    buffer = io.BytesIO()
    Image.new("L", (3, 2), 128).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Return the folder of notebooks in a checkout of its own."""
    monkeypatch.setattr(headless, "outputs_folder", lambda: tmp_path / "outputs")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    return folder


def write(path, *cells, tags=("parameters",)):
    """Write a notebook whose first cell is tagged, as the parameters are."""
    notebook = new_notebook(metadata=KERNEL, cells=list(cells))
    notebook.cells[0].metadata["tags"] = list(tags)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def notebook(notebooks):
    """Return a notebook of two cells: parameters, and one that prints them and draws."""
    use = f"""
import base64, os
from IPython.display import Image, display
print(mark, epochs, os.environ["MNISTLIB_RUNS"], os.getcwd())
display(Image(base64.b64decode("{png()}")))
"""
    return write(notebooks / "01_first.ipynb", new_code_cell(PARAMETERS), new_code_cell(use))


@pytest.fixture
def no_kernel(monkeypatch):
    """Have a test fail that executes a notebook."""

    def execute(*args, **kwargs):
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(papermill, "execute_notebook", execute)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("epoch", 5, "no notebook has a parameter 'epoch'; there are epochs, max_lr,"),
        ("batch_size", 64, "no notebook has a parameter 'batch_size'"),
        ("epochs", 0, "epochs is 0, but it must be from 1"),
        ("epochs", "many", "epochs is 'many', but it must be a whole number"),
        ("epochs", True, "epochs is True"),
        ("max_lr", float("nan"), "max_lr is nan"),
        ("recipe", "slow", "recipe is 'slow', but it must be one of"),
        ("rows", "3", "rows is '3', but the notebook has 3 there: give a value of type int"),
        ("rows", 3.5, "rows is 3.5"),
        ("rows", True, "rows is True"),
        ("rows", None, "rows is None"),
        ("share", "half", "share is 'half', but the notebook has 0.5 there"),
        ("quiet", 1, "quiet is 1, but the notebook has True there"),
        ("__import__('os').system('true')", 1, "no notebook has a parameter"),
        ("rows = 1; import os", 1, "no notebook has a parameter"),
    ],
)
def test_a_parameter_that_cannot_be_starts_no_kernel(
    notebook, runs_folder, no_kernel, name, value, text
):
    with pytest.raises(ConfigError) as error:
        check_parameters([notebook], {name: value})
    assert text in str(error.value)
    with pytest.raises(ConfigError):
        run_notebooks([notebook], {"mark": "b", name: value})
    assert not runs_folder.exists()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"epochs": 3, "max_lr": "1e-2"},
        {"recipe": "reference"},
        {"seed": None},
        {"mark": 0},
        {"rows": 4, "share": 1, "quiet": False, "half": 0.25},
    ],
    ids=str,
)
def test_parameters_that_can_be_are_accepted(notebook, parameters):
    check_parameters([notebook], parameters)


def test_a_parameter_of_one_of_several_notebooks_is_known(notebook, notebooks):
    other = write(notebooks / "02_other.ipynb", new_code_cell("dropout = 0.1"))
    without = write(notebooks / "03_none.ipynb", new_code_cell("x = 1"), tags=())
    check_parameters([notebook, other, without], {"dropout": 0.2})
    with pytest.raises(ConfigError, match="there are none"):
        check_parameters([without], {"x": 2})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("-p epochs 0", "epochs is 0"),
        ("-p max_lr abc", "max_lr is 'abc'"),
        ("-p epohcs 5", "'epohcs'"),
        ("02", "there is no notebook '02'; there are 01_first"),
        ("--in-place -p epochs 1", "--in-place"),
    ],
)
def test_the_command_says_what_cannot_be(notebook, capsys, no_kernel, arguments, text):
    before = notebook.read_bytes()
    assert main(["notebooks", *arguments.split()]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert text in err
    assert notebook.read_bytes() == before


def test_notebooks_are_found_by_the_beginnings_of_their_names(notebooks):
    names = ["01_a.ipynb", "02_b.ipynb", "10_c.ipynb"]
    for name in [*names, "draft.ipynb", "03_notes.md"]:
        (notebooks / name).touch()
    assert [p.name for p in find_notebooks()] == names
    assert [p.name for p in find_notebooks(["10", "02_b", "notebooks/01_a.ipynb"])] == [
        "10_c.ipynb", "02_b.ipynb", "01_a.ipynb",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="no notebook '04'; there are 01_a, 02_b, 10_c"):
        find_notebooks(["01", "04"])


def test_no_notebooks_at_all_is_said(notebooks):
    with pytest.raises(ConfigError, match="clone of the repository"):
        find_notebooks()


def test_a_notebook_is_executed_into_a_folder_with_its_figures(
    notebook, tmp_path, monkeypatch, runs_folder
):
    monkeypatch.chdir(tmp_path)
    source = notebook.read_bytes()
    folder = run_notebooks([notebook], {"mark": "b", "epochs": 2}, "new/folder")
    assert folder == runs_folder / "new" / "folder"
    marker = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
    assert marker == {"notebooks": [notebook.name], "parameters": {"mark": "b", "epochs": 2}}
    assert list(folder.glob(".running-*")) == []
    executed = nbformat.read(folder / notebook.name, as_version=4)
    (printed,) = [o.text for cell in executed.cells for o in cell.get("outputs", ()) if "text" in o]
    assert printed.split() == ["b", "2", str(folder), str(notebook.parent)]
    figure = folder / "figures" / "01_first-1.png"
    assert list((folder / "figures").iterdir()) == [figure]
    assert figure.read_bytes() == base64.b64decode(png())
    assert notebook.read_bytes() == source


def test_running_notebooks_leaves_the_environment_as_it_was(tmp_path, runs_folder):
    """Else the next run without a folder would go into this one's."""
    run_notebooks([], {}, "first")
    assert run_notebooks([], {}).parent == runs_folder


def test_a_cell_that_fails_ends_the_command_with_its_error(
    notebooks, capsys, monkeypatch, tiny_digits, runs_folder
):
    monkeypatch.setattr("mnistlib.__main__.load_mnist", lambda: tiny_digits)
    failing = new_code_cell("print('before')\n1 / 0")
    write(notebooks / "01_bad.ipynb", new_code_cell("a = 1"), failing, new_code_cell("print(2)"))
    folder = runs_folder / "folder"
    assert main(["notebooks", "01", "--folder", str(folder)]) == 1
    assert not (folder / "complete.json").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: cell 2 failed: ZeroDivisionError: division by zero"
    executed = nbformat.read(folder / "01_bad.ipynb", as_version=4)
    assert any("before" in str(cell.get("outputs")) for cell in executed.cells)


@pytest.mark.parametrize("folder", ["..", "../other", "/", "/etc/runs", ".", "a/../.."])
def test_a_folder_outside_of_the_runs_is_refused(notebook, runs_folder, no_kernel, folder):
    with pytest.raises(ConfigError, match=r"is not below .*; name one there, or set MNISTLIB_RUNS"):
        run_notebooks([notebook], {}, folder)
    assert not runs_folder.exists()


def test_a_folder_that_cannot_be_made_is_an_error(notebook, runs_folder, no_kernel):
    runs_folder.mkdir()
    (runs_folder / "taken").write_text("mine")
    with pytest.raises(ConfigError, match="taken cannot be written to"):
        run_notebooks([notebook], {}, "taken")
    assert (runs_folder / "taken").read_text() == "mine"


def test_of_two_executions_into_one_folder_the_second_is_refused(notebook, runs_folder, no_kernel):
    from filelock import FileLock

    folder = runs_folder / "one"
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text("of the first")
    with FileLock(folder / ".notebooks.lock"):
        with pytest.raises(ConfigError, match=r"another process is at work in .*one; name another"):
            run_notebooks([notebook], {}, "one")
        assert (folder / "complete.json").read_text() == "of the first"


TRAINS = """
import time
from pathlib import Path
import torch
from mnistlib import Config, Digits, train
labels = torch.arange(600) % 10
digits = Digits(torch.zeros(600, 1, 28, 28, dtype=torch.uint8), labels.to(torch.uint8), None, None,
                "mnist")
Path("started").touch()
config = Config(epochs=10_000, epoch_images=50, batch_size=25, max_lr=1e-6, device="cpu")
run = train(config, digits)
"""


@pytest.fixture
def at_work(notebooks, runs_folder):
    """Return a process that executes a notebook that trains for hours, and its folder."""
    cells = [new_code_cell("x = 1"), new_code_cell(TRAINS), new_code_cell("open('after', 'w')")]
    path = write(notebooks / "01_long.ipynb", *cells)
    command = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mnistlib import headless\n"
        "from mnistlib.__main__ import main\n"
        "headless.find_notebooks = lambda names: [Path(sys.argv[1])]\n"
        "sys.exit(main(['notebooks', '01', '--folder', 'long']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", command, str(path)], stderr=subprocess.PIPE, text=True
    ) as job:
        deadline = time.monotonic() + 120
        while not list((runs_folder / "long").rglob("mnist_model_*.pth")):
            assert job.poll() is None, job.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert kernels(runs_folder)
        yield job, runs_folder / "long"
        job.kill()
    while kernels(runs_folder):  # none outlives its execution
        assert time.monotonic() < deadline + 60
        time.sleep(0.1)


def kernels(runs: Path) -> set[int]:
    """Return the processes that are kernels and write below this folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            kernel = b"ipykernel_launcher" in (path / "cmdline").read_bytes()
            if kernel and bytes(runs) in (path / "environ").read_bytes():
                found.add(int(path.name))
    return found


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)][: tries(1, 2)]
)
def test_a_signal_is_passed_on_and_the_training_in_the_kernel_saves(at_work, number, code):
    job, folder = at_work
    job.send_signal(number)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == code
    assert f"stopped by {signal.Signals(number).name}; checkpoints are in the folder" in said
    executed = nbformat.read(folder / "01_long.ipynb", as_version=4)
    assert "interrupted" not in str(executed.cells[2].outputs)
    assert executed.cells[2].source.startswith("open")
    assert executed.cells[2].execution_count is None  # the cells after it did not run
    assert not (folder / "complete.json").exists()
    assert checkpoints(next(folder.glob("custom-*")))[-1][0] > 0


def test_a_killed_execution_leaves_no_notebook_half_written_and_checkpoints_that_load(at_work):
    job, folder = at_work
    job.kill()
    job.wait(60)
    assert not (folder / "01_long.ipynb").exists()
    assert not (folder / "complete.json").exists()
    assert checkpoints(next(folder.glob("custom-*")))


def traces(path):
    """Write a notebook as papermill leaves it, with what differs from run to run."""
    picture = new_output("display_data", {"image/png": png(), "text/plain": "<Figure>"})
    cells = [
        new_code_cell("a = 1", execution_count=1, metadata={"tags": ["parameters"]}),
        new_markdown_cell("Text", metadata={"papermill": {"duration": 0.1}}),
        new_code_cell("draw()", execution_count=2, outputs=[picture, picture]),
        new_code_cell("print(1)", execution_count=3, outputs=[new_output("stream", text="1\n")]),
    ]
    for cell in cells:
        cell.metadata |= {"papermill": {"duration": 0.1}, "execution": {"iopub.execute_input": "T"}}
    metadata = {
        "kernelspec": {"display_name": ".venv", "language": "python", "name": "mine"},
        "language_info": {"name": "python", "version": "3.11.7", "pygments_lexer": "ipython3"},
        "papermill": {"output_path": "somewhere", "parameters": {"a": 1}},
        "widgets": {},
    }
    nbformat.write(new_notebook(metadata=metadata, cells=cells), path)
    return path


def test_a_clean_notebook_keeps_kernel_language_and_tags_alone(tmp_path):
    path = traces(tmp_path / "01.ipynb")
    before = json.loads(path.read_text(encoding="utf-8"))
    clean_notebook(path)
    after = json.loads(path.read_text(encoding="utf-8"))
    assert after["metadata"] == KERNEL | {"language_info": {"name": "python"}}
    assert [cell["metadata"] for cell in after["cells"]] == [{"tags": ["parameters"]}, {}, {}, {}]
    for there, here in zip(before["cells"], after["cells"], strict=True):
        assert {k: v for k, v in there.items() if k != "metadata"} == {
            k: v for k, v in here.items() if k != "metadata"
        }
    once = path.read_bytes()
    clean_notebook(path)
    assert path.read_bytes() == once


def test_figures_are_extracted_anew(tmp_path):
    path, folder = traces(tmp_path / "01.ipynb"), tmp_path / "figures"
    folder.mkdir()
    (folder / "01-3.png").touch()  # of an earlier run that drew more
    (folder / "02-1.png").touch()
    paths = extract_figures(path, folder)
    assert [p.name for p in paths] == ["01-1.png", "01-2.png"]
    assert {p.name for p in folder.iterdir()} == {"01-1.png", "01-2.png", "02-1.png"}


def test_notebooks_executed_in_place_are_clean(notebooks, tmp_path, monkeypatch, tiny_digits):
    path = traces(notebooks / "01_first.ipynb")
    monkeypatch.setattr(headless, "load_mnist", lambda: tiny_digits)
    monkeypatch.setattr(papermill, "execute_notebook", lambda a, b, *_, **__: shutil.copy(a, b))
    execute_in_place([path])
    assert "papermill" not in path.read_text(encoding="utf-8")
    figures = tmp_path / "outputs" / "figures"
    assert {p.name for p in figures.iterdir()} == {"01_first-1.png", "01_first-2.png"}


def test_nothing_is_executed_in_place_on_the_sample(notebook, monkeypatch, tiny_digits, no_kernel):
    monkeypatch.setattr(headless, "load_mnist", lambda: replace(tiny_digits, source="sample"))
    before = notebook.read_bytes()
    with pytest.raises(ConfigError, match=r"full MNIST.*MNISTLIB_DATA"):
        execute_in_place([notebook])
    assert notebook.read_bytes() == before


def test_the_summary_says_what_came_out(tiny_config, tiny_digits, tmp_path):
    run = train(tiny_config, tiny_digits, folder=tmp_path / "a run")
    traces(tmp_path / "01.ipynb")
    extract_figures(tmp_path / "01.ipynb", tmp_path / "figures")
    text = summarise(tmp_path, tiny_digits, began=0.0)
    said = {line[:12].strip(): line[12:] for line in text.splitlines()}
    assert said["network"] == "reference, 13,912 parameters"
    assert said["validation"].startswith(f"{run.history[-1]['val_acc']:.2f} % of 100 images")
    assert said["checkpoint"] == str(run.checkpoint)
    assert said["figures"].endswith("(2 pictures)")
    assert said["notebook"] == str(tmp_path / "01.ipynb")
    sample = replace(tiny_digits, source="sample", test_images=None)
    assert summarise(tmp_path, sample, began=0.0).startswith("ON THE EMBEDDED SAMPLE")
