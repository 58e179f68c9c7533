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
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from mnistlib import ConfigError, MnistlibError, run_notebooks
from mniststudy.cli import main
from mniststudy.notebooks import (
    check_parameters,
    clean_notebook,
    execute_in_place,
    extract_figures,
    find_notebooks,
    read_value,
)

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


USES = f"""
import base64, os
from IPython.display import Image, display
print(mark, epochs, os.environ["MNISTLIB_RUNS"], os.getcwd())
display(Image(base64.b64decode("{png()}")))
"""


def write(path, *cells, tags=("parameters",)):
    """Write a notebook whose first cell is tagged, as the parameters are."""
    notebook = new_notebook(metadata=KERNEL, cells=list(cells))
    notebook.cells[0].metadata["tags"] = list(tags)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Return the folder of notebooks in a checkout of its own."""
    monkeypatch.setattr(run_notebooks, "outputs_folder", lambda: tmp_path / "outputs")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    return folder


@pytest.fixture
def notebook(notebooks):
    """Return a notebook of two cells: parameters, and one that prints them and draws."""
    return write(notebooks / "01_first.ipynb", new_code_cell(PARAMETERS), new_code_cell(USES))


@pytest.fixture
def engine(monkeypatch):
    """Have no kernel started: return a list of what papermill would do; else a test fails."""
    acts = []

    def execute(source, target, *_, **__):
        assert acts, "a kernel was started"
        acts[0](source, target)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    return acts


def fails(error):
    """Return what papermill does where a cell or a kernel fails."""

    def act(source, target):
        shutil.copy(source, target)
        assert not (target.parent / source.name).exists()  # its name it gets when it has ended
        raise error

    return act


def cell_error(name: str, value: str) -> papermill.PapermillExecutionError:
    return papermill.PapermillExecutionError(1, 2, "the cell", name, value, ["a traceback"])


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
        ("rows", "3", "rows is '3', but it must be of type int"),
        ("rows", 3.5, "rows is 3.5"),
        ("rows", True, "rows is True"),
        ("rows", None, "rows is None"),
        ("share", "half", "share is 'half', but it must be of type float"),
        ("quiet", 1, "quiet is 1, but it must be of type bool"),
        ("__import__('os').system('true')", 1, "no notebook has a parameter"),
        ("rows = 1; import os", 1, "no notebook has a parameter"),
    ],
)
def test_a_parameter_that_cannot_be_starts_no_kernel(
    notebook, runs_folder, engine, name, value, text
):
    with pytest.raises(ConfigError) as error:
        check_parameters([notebook], {name: value})
    assert text in str(error.value)
    with pytest.raises(ConfigError):
        run_notebooks.run_notebooks([notebook], {"mark": "b", name: value})
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
    other = write(notebooks / "02_other.ipynb", new_code_cell("max_lr = 0.1"))
    without = write(notebooks / "03_none.ipynb", new_code_cell("x = 1"), tags=())
    check_parameters([notebook, other, without], {"max_lr": 0.2})
    with pytest.raises(ConfigError, match="there are none"):
        check_parameters([without], {"x": 2})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("None", None), ("null", None), ("true", True), ("False", False), ("1", 1), ("-3", -3),
        ("1e-2", 0.01), ("2.0", 2.0), ("text", "text"), ("", ""), ("1 2", "1 2"), ("a(1)", "a(1)"),
    ],
)  # fmt: skip
def test_the_value_of_a_parameter_is_read(text, value):
    assert (read_value(text), type(read_value(text))) == (value, type(value))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("-p epochs 0", "epochs is 0"),
        ("-p max_lr abc", "max_lr is 'abc'"),
        ("-p epohcs 5", "'epohcs'"),
        ("-p rows many", "rows is 'many'"),
        ("02", "there is no notebook '02'; there are 01_first"),
        ("--in-place -p epochs 1", "--in-place"),
        ("--folder ..", "it lies elsewhere"),
    ],
)
def test_the_command_says_what_cannot_be(
    notebook, capsys, engine, tiny_digits, monkeypatch, arguments, text
):
    monkeypatch.setattr("mnistlib.load_mnist", lambda: tiny_digits)
    before = notebook.read_bytes()
    assert main(["notebooks", *arguments.split()]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert text in err
    assert notebook.read_bytes() == before


@pytest.mark.parametrize("missing", ["papermill", "ipykernel"])
def test_the_command_says_what_to_install(capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["notebooks", "01"]) == 1
    said = capsys.readouterr().err
    assert said == f"error: {missing} is not installed: pip install 'mnistlib[notebooks]'\n"


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


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Execute a notebook that works and one that fails, in real kernels, once for several tests."""
    top = tmp_path_factory.mktemp("executed")
    (top / "notebooks").mkdir()
    good = write(top / "notebooks/01_good.ipynb", new_code_cell(PARAMETERS), new_code_cell(USES))
    failing = new_code_cell("print('before')\n1 / 0")
    bad = write(
        top / "notebooks/02_bad.ipynb", new_code_cell("epochs = 1"), failing, new_code_cell("2")
    )
    sources = good.read_bytes(), bad.read_bytes()
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MNISTLIB_RUNS", str(top / "runs"))
        m.chdir(top)
        with pytest.raises(MnistlibError) as error:
            run_notebooks.run_notebooks([good, bad], {"mark": "b", "epochs": 2}, "new/folder")
        after = dict(run_notebooks.os.environ)
    assert (good.read_bytes(), bad.read_bytes()) == sources
    assert after["MNISTLIB_RUNS"] == str(top / "runs")  # else the next run would go into this one's
    return top / "runs" / "new" / "folder", str(error.value)


def test_a_notebook_is_executed_into_a_folder_with_its_figures(executed):
    folder, _ = executed
    notebook = nbformat.read(folder / "01_good.ipynb", as_version=4)
    (printed,) = [o.text for cell in notebook.cells for o in cell.get("outputs", ()) if "text" in o]
    assert printed.split() == ["b", "2", str(folder), str(folder.parents[2] / "notebooks")]
    figure = folder / "figures" / "01_good-1.png"
    assert list((folder / "figures").iterdir()) == [figure]
    assert figure.read_bytes() == base64.b64decode(png())
    assert {p.name for p in folder.iterdir()} == {"01_good.ipynb", "02_bad.ipynb", "figures"}


def test_a_cell_that_fails_ends_it_with_a_sentence_and_its_notebook_shows_where(executed):
    folder, said = executed
    assert said == "cell 3 of 02_bad.ipynb failed: ZeroDivisionError: division by zero"
    cells = nbformat.read(folder / "02_bad.ipynb", as_version=4).cells
    assert any("before" in str(cell.get("outputs")) for cell in cells)
    assert cells[-1].execution_count is None
    assert not any("mark =" in cell.source for cell in cells)  # it has no such parameter


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (cell_error("ConfigError", "digit is 11, but it must be from 0 to 9"),
         "digit is 11, but it must be from 0 to 9"),
        (cell_error("DatasetError", "the file is damaged"), "the file is damaged"),
        (cell_error("AssertionError", ""), "cell 2 of 01_first.ipynb failed: AssertionError"),
        (cell_error("KeyError", "1\nand\nmore"), "cell 2 of 01_first.ipynb failed: KeyError: 1"),
        (DeadKernelError("Kernel died"), "01_first.ipynb was given up: Kernel died"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_what_went_wrong_in_a_notebook_is_one_sentence(
    notebook, engine, capsys, monkeypatch, tiny_digits, runs_folder, error, said
):
    monkeypatch.setattr("mnistlib.load_mnist", lambda: tiny_digits)
    engine.append(fails(error))
    assert main(["notebooks", "01", "--folder", "here"]) == 1
    assert capsys.readouterr() == ("", f"01_first.ipynb\nerror: {said}\n")
    assert [p.name for p in (runs_folder / "here").iterdir()] == ["01_first.ipynb"]


def test_without_a_folder_it_is_named_by_the_time_and_no_other_run_is_in_it(
    notebook, engine, runs_folder, monkeypatch
):
    engine.append(shutil.copy)
    folder = run_notebooks.run_notebooks([notebook], {})
    assert folder.parent == runs_folder
    time.strptime(folder.name, "%Y%m%d_%H%M%S")

    class Now(run_notebooks.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.strptime(folder.name, "%Y%m%d_%H%M%S")

    monkeypatch.setattr(run_notebooks, "datetime", Now)
    with pytest.raises(ConfigError, match="cannot be the folder"):
        run_notebooks.run_notebooks([notebook], {})


@pytest.mark.parametrize("folder", ["..", "../other", "/", "/etc/runs", ".", "a/../.."])
def test_a_folder_outside_of_the_runs_is_refused(notebook, runs_folder, engine, folder):
    with pytest.raises(ConfigError, match=r"lies elsewhere\); name one below .*MNISTLIB_RUNS"):
        run_notebooks.run_notebooks([notebook], {}, folder)
    assert not runs_folder.exists()


def test_a_folder_that_cannot_be_made_is_an_error(notebook, runs_folder, engine):
    runs_folder.mkdir()
    (runs_folder / "taken").write_text("mine")
    with pytest.raises(ConfigError, match="taken cannot be the folder"):
        run_notebooks.run_notebooks([notebook], {}, "taken")
    assert (runs_folder / "taken").read_text() == "mine"


def kernels(runs: Path) -> set[int]:
    """Return the processes that are kernels and write below this folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            kernel = b"ipykernel_launcher" in (path / "cmdline").read_bytes()
            if kernel and bytes(runs) in (path / "environ").read_bytes():
                found.add(int(path.name))
    return found


WAITS = """
import time
from pathlib import Path
Path("started").touch()
try:
    time.sleep(1000)
except KeyboardInterrupt:
    Path("told").touch()
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="kernels are looked for in /proc")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        *(
            pytest.param(number, -number, marks=pytest.mark.stress)
            for number in (signal.SIGTERM, signal.SIGKILL)
        ),
    ],
)
def test_ctrl_c_ends_it_with_130_and_leaves_no_kernel_behind(notebooks, runs_folder, number, code):
    cells = [new_code_cell("x = 1"), new_code_cell(WAITS), new_code_cell("open('after', 'w')")]
    write(notebooks / "01_long.ipynb", *cells)
    command = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mnistlib import __main__, run_notebooks\n"
        "run_notebooks.outputs_folder = lambda: Path(sys.argv[1]) / 'outputs'\n"
        "__main__.mnistlib.load_mnist = lambda: None\n"
        "sys.exit(__main__.main(['notebooks', '01', '--folder', 'long']))\n"
    )
    deadline = time.monotonic() + 60
    command = [sys.executable, "-c", command, str(notebooks.parent)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
        try:
            while not (notebooks / "started").exists():
                assert job.poll() is None, job.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert kernels(runs_folder)
            job.send_signal(number)
            said = job.communicate(timeout=60)[1]
        finally:
            job.kill()
    assert job.returncode == code
    if number == signal.SIGINT:
        assert said.splitlines()[-1] == "interrupted"
        assert "Traceback" not in said
        assert (notebooks / "told").exists()  # so that a training in it saves its checkpoint
    else:
        assert not (runs_folder / "long" / "01_long.ipynb").exists()  # none is half written
    while kernels(runs_folder):
        assert time.monotonic() < deadline + 30
        time.sleep(0.05)
    assert not (notebooks / "after").exists()


def traces(path):
    """Write a notebook as papermill leaves it, with what differs from run to run."""
    picture = new_output("display_data", {"image/png": png(), "text/plain": "<Figure>"})
    cells = [
        new_code_cell("a = 1", execution_count=1, metadata={"tags": ["parameters"]}),
        new_markdown_cell("Text", metadata={"papermill": {"duration": 0.1}, "tags": []}),
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


def test_a_clean_notebook_has_no_messages_on_stderr(tmp_path):
    cell = new_code_cell("1 + 1")
    cell.outputs = [new_output("stream", name=n, text=n) for n in ("stdout", "stderr")]
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "01.ipynb")
    clean_notebook(tmp_path / "01.ipynb")
    (cell,) = nbformat.read(tmp_path / "01.ipynb", as_version=4).cells
    assert [output.name for output in cell.outputs] == ["stdout"]


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
    extract_figures(path, folder)
    assert {p.name for p in folder.iterdir()} == {"01-1.png", "01-2.png", "02-1.png"}
    assert (folder / "01-2.png").read_bytes() == base64.b64decode(png())


def test_notebooks_executed_in_place_are_clean(
    notebooks, tmp_path, monkeypatch, tiny_digits, engine
):
    path = traces(notebooks / "01_first.ipynb")
    monkeypatch.setattr(run_notebooks, "load_mnist", lambda: tiny_digits)
    engine.append(shutil.copy)
    assert main(["notebooks", "--in-place"]) == 0
    assert "papermill" not in path.read_text(encoding="utf-8")
    figures = tmp_path / "outputs" / "figures"
    assert {p.name for p in figures.iterdir()} == {"01_first-1.png", "01_first-2.png"}


def test_if_one_notebook_fails_in_place_none_is_changed(
    notebooks, tmp_path, monkeypatch, tiny_digits, engine
):
    paths = [traces(notebooks / name) for name in ("01_first.ipynb", "02_second.ipynb")]
    before = [path.read_bytes() for path in paths]
    monkeypatch.setattr(run_notebooks, "load_mnist", lambda: tiny_digits)

    def act(source, target):
        shutil.copy(source, target)
        if source == paths[1]:
            raise cell_error("ValueError", "no")

    engine.append(act)
    with pytest.raises(MnistlibError, match=r"02_second\.ipynb failed: ValueError: no"):
        execute_in_place(paths)
    assert [path.read_bytes() for path in paths] == before
    assert not (tmp_path / "outputs").exists()


def test_nothing_is_executed_in_place_on_the_sample(notebook, monkeypatch, tiny_digits, engine):
    monkeypatch.setattr(run_notebooks, "load_mnist", lambda: replace(tiny_digits, source="sample"))
    before = notebook.read_bytes()
    with pytest.raises(ConfigError, match=r"full MNIST.*MNISTLIB_DATA"):
        execute_in_place([notebook])
    assert notebook.read_bytes() == before
