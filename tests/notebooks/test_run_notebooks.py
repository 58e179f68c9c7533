"""Notebooks without a screen: bad parameters start no kernel, and what is committed is clean."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch
from urllib.parse import unquote

import nbformat
import papermill
import psutil
import pytest
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

import mniststudy.notebooks
from mnistlib import ConfigError, MnistlibError
from mnistlib.distill import pool_folder
from mnistlib.paths import folder_from, runs_folder
from mniststudy.cli import main
from mniststudy.notebooks import (
    clean_notebook,
    execute_in_place,
    find_notebooks,
    open_lab,
    read_parameters,
    run_notebooks,
)

KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
PARAMETERS = """epochs = 1
max_lr = 0.01
pool = None
recipe = "fast"
mark = "a"
rows = 3
settings = ""
share = 0.5
quiet = True"""
WAITS = """
import time
from pathlib import Path
Path("started").touch()
try:
    time.sleep(1000)
except KeyboardInterrupt:
    Path("told").touch()
"""


def png() -> bytes:
    """Return a small picture."""
    buffer = io.BytesIO()
    Image.new("L", (3, 2), 128).save(buffer, "PNG")
    return buffer.getvalue()


USES = f"""
import os
from IPython.display import Image, display
import matplotlib.pyplot as plt
print(mark, epochs, os.environ["MNISTLIB_RUNS"], os.getcwd())
display(Image({png()!r}))
plt.plot([1, 2])
"""


def write(path, *sources, tags=("parameters",)):
    """Write a notebook whose first cell is tagged, as the parameters are."""
    notebook = new_notebook(metadata=KERNEL, cells=[new_code_cell(source) for source in sources])
    notebook.cells[0].metadata["tags"] = list(tags)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def notebooks(tmp_path, monkeypatch, tiny_digits):
    """Return the folder of notebooks in a checkout of its own."""
    monkeypatch.setattr(mniststudy.notebooks, "outputs_folder", lambda: tmp_path / "outputs")
    monkeypatch.setattr(mniststudy.notebooks, "load_mnist", lambda: tiny_digits)
    monkeypatch.setattr("mnistlib.load_mnist", lambda: tiny_digits)
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


@pytest.fixture
def notebook(notebooks):
    """Return a notebook of two cells: parameters, and one that prints them and draws."""
    return write(notebooks / "01_first.ipynb", PARAMETERS, USES)


@pytest.fixture
def engine(monkeypatch):
    """Have no kernel started: return a list of what papermill would do; else a test fails."""
    acts = []

    def execute(source, target, *_, **__):
        assert acts, "a kernel was started"
        acts[0](source, target)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    return acts


def fails(error, name="01_first.ipynb"):
    """Return what papermill does where a cell or a kernel of a notebook fails."""

    def act(source, target):
        shutil.copy(source, target)
        assert not (target.parent / source.name).exists()  # its name it gets when it has ended
        if source.name == name:
            raise error

    return act


def cell_error(name: str, value: str) -> papermill.PapermillExecutionError:
    return papermill.PapermillExecutionError(1, 2, "the cell", name, value, ["a traceback"])


def test_a_parameter_that_cannot_be_starts_no_kernel(notebook, runs_folder, engine):
    for name, value, text in [
        ("epoch", 5, "no notebook has a parameter 'epoch'; there are epochs, max_lr,"),
        ("batch_size", 64, "no notebook has a parameter 'batch_size'"),
        ("rows = 1; import os", 1, "no notebook has a parameter"),
        ("epochs", 0, "epochs is 0, but it must be from 1"),
        ("epochs", "many", "epochs is 'many', but it must be a whole number"),
        ("epochs", True, "epochs is True"),
        ("max_lr", float("nan"), "max_lr is nan"),
        ("recipe", "slow", "recipe is 'slow', but it must be one of"),
        ("pool", "1234567", "pool is '1234567', but it must be eight hex digits"),
        ("rows", "3.5", "rows is '3.5', but it must be a whole number"),
        ("rows", True, "rows is True"),
        ("rows", None, "rows is None"),
        ("share", "half", "share is 'half', but it must be a finite number"),
        ("quiet", "no", "quiet is 'no', but it must be true or false"),
        ("settings", "epochs", "settings is 'epochs', but it must be like 'epochs=3 max_lr=0.1'"),
        ("settings", "epochs=0", "epochs is 0, but it must be from 1"),
        ("settings", "epoch=3", "no setting 'epoch'; choose from anneal, batch_size"),
    ]:
        with pytest.raises(ConfigError, match=f"^{re.escape(text)}"):
            run_notebooks([notebook], {"mark": "b", name: value})
    assert not runs_folder.exists()


def test_a_value_is_read_by_the_type_of_its_default(notebook, notebooks):
    other = write(notebooks / "02_other.ipynb", "height = 0.1")
    names = ("12345678", "1e234567", "528686e9")
    taught = [{"recipe": "best", "pool": name, "mark": name} for name in names]
    for given, kept in [
        *zip(taught, taught, strict=True),
        ({"epochs": "3", "rows": "4", "quiet": "false"}, {"epochs": 3, "rows": 4, "quiet": False}),
        ({"max_lr": "1e-2", "share": "1"}, {"max_lr": 0.01, "share": 1.0}),
        ({"height": "2"}, {"height": 2.0}),  # which the other one has
        ({"rows": 4, "share": 0.25, "quiet": True}, {"rows": 4, "share": 0.25, "quiet": True}),
        ({"recipe": "reference", "epochs": None}, {"recipe": "reference", "epochs": 20}),
        ({"settings": "epochs=3 model='c8 p full'"}, {"settings": "epochs=3 model='c8 p full'"}),
        ({}, {}),
    ]:
        found = read_parameters([notebook, other], given)
        assert found == kept
        assert [type(found[name]) for name in kept] == [type(value) for value in kept.values()]


@pytest.mark.parametrize("source", ["a = 'run #3'", "a = 'k=v'", "b = 1; a = 'x'", "a: str = 'x'"])
def test_parameters_are_read_as_python_reads_them(tmp_path, source):
    path = tmp_path / "own.ipynb"
    write(path, f"{source}\nc = len('computed')")
    assert read_parameters([path], {"a": "y # z"}) == {"a": "y # z"}
    with pytest.raises(ConfigError, match="no notebook has a parameter 'c'"):
        read_parameters([path], {"c": 1})


@pytest.mark.parametrize(("default", "kind"), [("[16, 32]", "list"), ("(16, 32)", "tuple")])
def test_a_parameter_that_cannot_be_given_is_refused_by_its_type(tmp_path, default, kind):
    write(path := tmp_path / "own.ipynb", f"layers = {default}")
    with pytest.raises(ConfigError, match=f"^layers is a {kind}, which cannot be given"):
        read_parameters([path], {"layers": "16"})


def test_notebooks_are_found_by_the_beginnings_of_their_names(notebooks):
    with pytest.raises(ConfigError, match="clone of the repository"):
        find_notebooks()
    names = ["01_a.ipynb", "02_b.ipynb", "10_c.ipynb"]
    for name in [*names, "draft.ipynb", "03_notes.md"]:
        (notebooks / name).touch()
    assert [p.name for p in find_notebooks()] == names
    found = find_notebooks(["10", "02_b", "notebooks/01_a.ipynb", "2"])
    assert [p.name for p in found] == ["10_c.ipynb", "02_b.ipynb", "01_a.ipynb"]
    assert [p.name for p in find_notebooks(["1"])] == ["01_a.ipynb"]  # a number, which 10 is not
    with pytest.raises(ConfigError, match="no notebook '0'; there are 01_a, 02_b, 10_c"):
        find_notebooks(["01", "0"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"kernelspec": {"name": "ir", "display_name": "R", "language": "R"}}', "language is R"),
        ('{"kernelspec": {"name": "python3", "display_name": "Python 3"}}', "No language found"),
        ('{"language_info": {"name": "python"}}', "No kernel name found"),
        ("{<<<<<<< HEAD", "not appear to be JSON"),
    ],
)
def test_a_notebook_that_is_damaged_or_of_another_language_starts_no_kernel(
    notebook, engine, capsys, content, said
):
    whole = nbformat.read(notebook, as_version=4) | {"metadata": "METADATA"}
    notebook.write_text(json.dumps(whole).replace('"METADATA"', content))
    assert main(["notebooks", "-p", "epochs", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 01_first.ipynb cannot be executed (")
    assert said in error
    assert error.endswith("; save it in JupyterLab with the kernel Python 3\n")


def test_a_kernel_knows_the_folders_wherever_it_runs_and_pools_stay_with_the_runs(
    notebook, engine, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RUNS": "mine", "DATA": "~/digits"}.items():
        monkeypatch.setenv(f"MNISTLIB_{name}", value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    seen = []

    def kernel(source, target):
        shutil.copy(source, target)
        monkeypatch.chdir(source.parent)
        monkeypatch.setenv("HOME", "elsewhere")
        seen.extend([runs_folder(), pool_folder("12345678"), folder_from("MNISTLIB_DATA")])

    engine.append(kernel)
    assert run_notebooks([notebook], {}, "here") == tmp_path / "mine" / "here"
    pool = tmp_path / "mine" / "pools" / "12345678"
    assert seen == [tmp_path / "mine" / "here", pool, tmp_path / "home" / "digits"]


def test_jupyterlab_is_started_in_the_clone_which_has_the_pictures(
    notebooks, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MNISTLIB_RUNS", "mine")
    started = []
    monkeypatch.setattr("jupyterlab.labapp.main", started.extend)
    with patch.dict(os.environ):
        open_lab()
        assert os.environ["MNISTLIB_RUNS"] == str(tmp_path / "mine")
    root, opened = (option.partition("=")[2] for option in started)
    assert Path(root) / opened.removeprefix("/lab/tree/") == notebooks


def test_a_notebook_is_executed_into_a_folder_and_one_that_fails_shows_where(
    notebooks, notebook, runs_folder, monkeypatch
):
    bad = write(notebooks / "02_bad.ipynb", "epochs = 1", "print('before')\n1 / 0", "2")
    sources = notebook.read_bytes(), bad.read_bytes()
    monkeypatch.chdir(notebooks.parent)
    monkeypatch.setenv("MPLBACKEND", "agg")  # a user's own settings, with which nothing is shown
    profile = notebooks / "profile_default" / "ipython_kernel_config.py"
    profile.parent.mkdir()
    profile.write_text("get_config().InlineBackend.figure_formats = ['svg']")
    monkeypatch.setenv("IPYTHONDIR", str(notebooks))
    with pytest.raises(MnistlibError) as error:
        run_notebooks([notebook, bad], {"mark": "b", "epochs": 2}, "new/folder")
    assert str(error.value) == "cell 3 of 02_bad.ipynb failed: ZeroDivisionError: division by zero"
    assert os.environ["MNISTLIB_RUNS"] == str(runs_folder)  # else the next would go into this one's
    assert (notebook.read_bytes(), bad.read_bytes()) == sources
    folder = runs_folder / "new" / "folder"
    assert {p.name for p in folder.iterdir()} == {"01_first.ipynb", "02_bad.ipynb", "figures"}
    good, bad = (nbformat.read(p, as_version=4).cells for p in sorted(folder.glob("*.ipynb")))
    (printed,) = [o.text for cell in good for o in cell.get("outputs", ()) if "text" in o]
    assert printed.split() == ["b", "2", str(folder), str(Path.cwd())]  # where files are named from
    names = {p.name for p in (folder / "figures").iterdir()}
    assert names == {"01_first-1.png", "01_first-2.png"}
    assert (folder / "figures" / "01_first-1.png").read_bytes() == png()
    assert any("before" in str(cell.get("outputs")) for cell in bad)
    assert bad[-1].execution_count is None
    assert not any("mark =" in cell.source for cell in bad)  # it has no such parameter


def test_what_went_wrong_in_a_notebook_is_one_sentence(notebook, engine, capsys, runs_folder):
    failed = "cell 2 of 01_first.ipynb failed"
    for error, said in [
        (cell_error("ConfigError", "digit is 11, so"), "digit is 11, so"),
        (cell_error("DatasetError", "the file is damaged"), "the file is damaged"),
        (cell_error("AssertionError", ""), f"{failed}: AssertionError"),
        (cell_error("KeyError", "1\nand\nmore"), f"{failed}: KeyError: 1"),
        (DeadKernelError("Kernel died"), "01_first.ipynb was given up: Kernel died"),
    ]:
        engine[:] = [fails(error)]
        assert main(["notebooks", "01", "--folder", "here"]) == 1
        assert capsys.readouterr() == ("", f"error: {said}\n")
        assert [p.name for p in (runs_folder / "here").iterdir()] == ["01_first.ipynb"]
        shutil.rmtree(runs_folder / "here")


def test_without_a_folder_it_is_named_by_the_time_and_no_other_run_is_in_it(
    notebook, engine, runs_folder, monkeypatch
):
    engine.append(shutil.copy)
    folder = run_notebooks([notebook], {})
    assert folder.parent == runs_folder
    time.strptime(folder.name, "%Y%m%d_%H%M%S")

    class Now(mniststudy.notebooks.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.strptime(folder.name, "%Y%m%d_%H%M%S")

    monkeypatch.setattr(mniststudy.notebooks, "datetime", Now)
    with pytest.raises(ConfigError, match="cannot be a folder"):
        run_notebooks([notebook], {})
    (runs_folder / "taken").write_text("mine")
    with pytest.raises(ConfigError, match="taken cannot be a folder"):
        run_notebooks([notebook], {}, "taken")


def kernels(runs: Path) -> list[int]:
    """Return the processes that are kernels and write below this folder."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "environ"])
        if "ipykernel_launcher" in (process.info["cmdline"] or ())
        and str(runs) in str(process.info["environ"])
    ]


def wait_until(condition, seconds=60):
    """Wait for something; fail if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def long(notebooks, monkeypatch):
    """Return a notebook that waits."""
    monkeypatch.chdir(notebooks)
    return write(notebooks / "01_long.ipynb", "x = 1", WAITS, "open('after', 'w')")


def test_ctrl_c_ends_it_with_130_and_leaves_no_kernel_behind(long, runs_folder, capsys):
    def press():
        wait_until((long.parent / "started").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    assert main(["notebooks", "01", "--folder", "long"]) == 130
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
    assert (long.parent / "told").exists()  # so that a training in it saves its checkpoint
    wait_until(lambda: not kernels(runs_folder))
    assert not (long.parent / "after").exists()


@pytest.mark.stress
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_kernel_and_no_half_written_notebook(long, runs_folder, number):
    script = "import sys, mniststudy.notebooks as n, pathlib as p; "
    script += "n.run_notebooks([p.Path(sys.argv[1])], {}, 'long')"
    with subprocess.Popen([sys.executable, "-c", script, str(long)]) as job:
        try:
            wait_until((long.parent / "started").exists)
            assert kernels(runs_folder)
            job.send_signal(number)
            assert job.wait(60) == -number
        finally:
            job.kill()
    assert not (runs_folder / "long" / "01_long.ipynb").exists()
    wait_until(lambda: not kernels(runs_folder))
    assert not (long.parent / "after").exists()


LINKS = ["../outputs/figures/a.png", "../README.md", "../outputs/page.html"]


def links(path):
    """Return where a notebook's pictures, links and frames lead."""
    return re.findall(r'(?:]\(|src=\\")([^)\\]+)', path.read_text(encoding="utf-8"))


def traces(path):
    """Write a notebook as papermill leaves it, with what differs from run to run."""
    encoded = base64.b64encode(png()).decode()
    picture = new_output("display_data", {"image/png": encoded, "text/plain": "<Figure>"})
    said = [new_output("stream", name=name, text=name) for name in ("stdout", "stderr")]
    said.append(new_output("display_data", {"text/html": f'<iframe src="{LINKS[2]}">'}))
    cells = [
        new_code_cell("a = 1", execution_count=1, metadata={"tags": ["parameters"]}),
        new_markdown_cell(f"![Text]({LINKS[0]}) [b]({LINKS[1]})", metadata={"tags": []}),
        new_code_cell("draw()", execution_count=2, outputs=[picture, picture]),
        new_code_cell("print(1)", execution_count=3, outputs=said),
        new_code_cell("assert a", execution_count=4, metadata={"tags": ["check"]}),
    ]
    for cell in cells:
        cell.metadata |= {"papermill": {"duration": 0.1}, "execution": {"iopub.execute_input": "T"}}
    metadata = {
        "kernelspec": {"display_name": ".venv", "language": "python", "name": "mine"},
        "language_info": {"name": "python", "version": "3.11.7", "pygments_lexer": "ipython3"},
        "papermill": {"output_path": "somewhere", "parameters": {"a": 1}},
    }
    nbformat.write(new_notebook(metadata=metadata, cells=cells), path)
    return path


def test_a_clean_notebook_keeps_language_tags_and_outputs_and_its_checks_are_closed(tmp_path):
    path = traces(tmp_path / "01.ipynb")
    before = nbformat.read(path, as_version=4)
    clean_notebook(path)
    once, after = path.read_bytes(), nbformat.read(path, as_version=4)
    assert after.metadata == KERNEL | {"language_info": {"name": "python"}}
    closed = {"tags": ["check"], "jupyter": {"source_hidden": True}}
    assert [c.metadata for c in after.cells] == [{"tags": ["parameters"]}, {}, {}, {}, closed]
    del before.cells[3].outputs[1]
    for there, here in zip(before.cells, after.cells, strict=True):
        assert there | {"metadata": {}} == here | {"metadata": {}}
    clean_notebook(path)
    assert path.read_bytes() == once


def test_the_pictures_of_an_executed_notebook_are_those_of_the_clone(notebooks, engine, tmp_path):
    path = traces(notebooks / "01_first.ipynb")
    assert links(path) == LINKS
    engine.append(shutil.copy)
    for name in ("deep/er", tmp_path / "my runs"):
        folder = run_notebooks([path], {}, name)
        found = [(folder / unquote(link)).resolve() for link in links(folder / path.name)]
        assert found == [(notebooks / link).resolve() for link in LINKS]
    execute_in_place([path])
    assert links(path) == LINKS


def test_notebooks_executed_in_place_are_clean_and_their_figures_are_new(notebooks, engine):
    path = traces(notebooks / "01_first.ipynb")
    figures = notebooks.parent / "outputs" / "figures"
    figures.mkdir(parents=True)
    (figures / "01_first-3.png").touch()  # of an earlier run that drew more
    (figures / "02_other-1.png").touch()
    engine.append(shutil.copy)
    assert main(["notebooks", "--in-place"]) == 0
    assert "papermill" not in path.read_text(encoding="utf-8")
    names = {"01_first-1.png", "01_first-2.png", "02_other-1.png"}
    assert {p.name for p in figures.iterdir()} == names
    assert (figures / "01_first-2.png").read_bytes() == png()


def test_if_one_notebook_fails_in_place_or_there_is_only_the_sample_none_is_changed(
    notebooks, tmp_path, monkeypatch, tiny_digits, engine, capsys
):
    paths = [traces(notebooks / name) for name in ("01_first.ipynb", "02_second.ipynb")]
    before = [path.read_bytes() for path in paths]
    engine.append(fails(cell_error("ValueError", "no"), "02_second.ipynb"))
    with pytest.raises(MnistlibError, match=r"02_second\.ipynb failed: ValueError: no"):
        execute_in_place(paths)
    assert main(["notebooks", "--in-place", "-p", "epochs", "1"]) == 1
    assert capsys.readouterr().err.startswith("error: --in-place executes notebooks as committed")
    sample = replace(tiny_digits, source="sample")
    monkeypatch.setattr(mniststudy.notebooks, "load_mnist", lambda: sample)
    with pytest.raises(ConfigError, match=r"full MNIST.*MNISTLIB_DATA"):
        execute_in_place(paths)
    assert [path.read_bytes() for path in paths] == before
    assert not (tmp_path / "outputs").exists()
