"""The notebooks in JupyterLab itself: each opens as it was committed, and some are run there."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from drawing import PICTURES, ROOT

pytestmark = pytest.mark.browser
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
RUN = [name for name in NOTEBOOKS if name[:2] in ("01", "02", "10")]
MINUTE = 60_000  # milliseconds
# No question about news, no look for updates, and every cell in the page whether seen or not
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Start JupyterLab on a copy of the repository; return where it is, to be formatted."""
    folder = tmp_path_factory.mktemp("lab")
    copy = folder / "mnistlib"
    unneeded = shutil.ignore_patterns("__pycache__", "runs", ".ipynb_checkpoints")
    for name in ("mnistlib", "mniststudy", "notebooks", "outputs"):
        shutil.copytree(ROOT / name, copy / name, ignore=unneeded)
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name, values in SETTINGS.items():
        path = folder / "config/lab/user-settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex()
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "MNISTLIB_RUNS": str(folder / "runs"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={copy}"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=copy, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/{{}}?token={token}"
    until = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < until:
        try:
            urllib.request.urlopen(address.format("api"), timeout=5).close()
            break
        except OSError:
            time.sleep(0.5)
    else:
        server.kill()
        pytest.fail(f"JupyterLab did not start: {(folder / 'log').read_text()}")
    yield address
    server.kill()  # on SIGTERM it can take a minute; its kernels have ended by now
    server.wait()


@pytest.fixture
def open_notebook(lab, browser):
    """Return a function that opens a notebook and waits until its last cell is there."""
    contexts = []

    def opened(name):
        contexts.append(browser.new_context(viewport={"width": 1400, "height": 1800}))
        page = contexts[-1].new_page()
        page.set_default_timeout(2 * MINUTE)
        page.goto(lab.format(f"lab/tree/notebooks/{name}.ipynb") + "&reset")  # nothing else is open
        page.wait_for_selector("#jupyterlab-splash", state="detached")
        page.wait_for_selector("text=/ipykernel.* Idle/")  # in the status bar
        return page

    yield opened
    for context in contexts:
        context.close()
    with urllib.request.urlopen(lab.format("api/kernels")) as answer:
        for kernel in json.load(answer):
            end = lab.format(f"api/kernels/{kernel['id']}")
            urllib.request.urlopen(urllib.request.Request(end, method="DELETE")).close()


def committed(name):
    """Return the cells of a committed notebook."""
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))["cells"]


def pictures(name):
    """Return how many pictures a notebook has, in its prose and in its outputs."""
    count = 0
    for cell in committed(name):
        if cell["cell_type"] == "markdown":
            count += len(re.findall(r"!\[|<img", "".join(cell["source"])))
        count += sum("image/png" in output.get("data", ()) for output in cell.get("outputs", ()))
    return count


def wait_for_pictures(page, name):
    """Wait until as many pictures are there as were committed, each of them loaded."""
    loaded = "[...document.querySelectorAll('.jp-Notebook img')].filter(i => i.naturalWidth > 40)"
    page.wait_for_function(f"{loaded}.length === {pictures(name)}")


def errors(page):
    """Return the errors shown, which JupyterLab draws as it does other text on stderr."""
    text = page.locator('[data-mime-type="application/vnd.jupyter.stderr"]')
    return text.filter(has_text="Traceback (most recent call last)").all_inner_texts()


def prompts(page):
    """Return what stands before each code cell: [1]:, [*]: while it runs, [ ]: before."""
    return page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()


def run_all(page):
    """Clear all outputs and run all cells, both from the menu; wait until no cell waits."""
    for menu, entry in [("Edit", "Clear Outputs of All Cells"), ("Run", "Run All Cells")]:
        page.get_by_role("menuitem", name=menu, exact=True).click()
        page.get_by_role("menuitem", name=entry, exact=True).click()
    # the first has its number, and none has the star of a cell that runs or waits
    texts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.innerText)"
    over = f"(all => /\\d/.test(all[0]) && !all.some(text => text.includes('*')))({texts})"
    page.wait_for_function(over, timeout=10 * MINUTE)
    page.wait_for_selector("text=/ipykernel.* Idle/")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_opens_with_its_outputs_and_pictures(open_notebook, name):
    page = open_notebook(name)
    wait_for_pictures(page, name)
    title = "".join(committed(name)[0]["source"]).splitlines()[0].removeprefix("# ")
    assert page.locator(".jp-Notebook h1").first.inner_text().rstrip("¶") == title
    answered = page.locator(".jp-CodeCell", has=page.locator(".jp-OutputArea-output"))
    assert answered.count() == sum(bool(cell.get("outputs")) for cell in committed(name))
    assert page.locator(".jp-Dialog").count() == 0
    assert errors(page) == []
    page.screenshot(path=PICTURES / f"{name}.png")


@pytest.mark.parametrize("name", RUN)
def test_a_notebook_runs_from_the_menu_without_an_error(open_notebook, name):
    page = open_notebook(name)
    run_all(page)
    page.screenshot(path=PICTURES / f"{name}-run.png")
    assert errors(page) == []
    code = [c for c in committed(name) if c["cell_type"] == "code" and "".join(c["source"])]
    assert prompts(page) == [f"[{i}]:" for i in range(1, len(code) + 1)]
    wait_for_pictures(page, name)
