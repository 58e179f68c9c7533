"""What must be in no file of the repository: code run out of a file, active outputs, paths."""

import re
import subprocess
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_clone_has_the_same_bytes_whatever_line_endings_its_git_prefers():
    listed = subprocess.run(
        ["git", "ls-files", "--eol"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for line in listed.stdout.splitlines():
        about, _, name = line.partition("\t")
        assert about.split(maxsplit=2)[2].strip() in ("attr/-text", "attr/text=auto eol=lf"), name


def test_papermill_as_written_needs_no_folder_that_a_clone_lacks_and_shows_the_pictures():
    texts = [*ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    whole = "".join(path.read_text(encoding="utf-8") for path in texts)
    (target,) = {ROOT / name for name in re.findall(r"`papermill \S+ (\S+\.ipynb)", whole)}
    assert target.parent in {path.parent for path in tracked()}
    assert (target.parent / "../outputs/figures").resolve() == ROOT / "outputs" / "figures"
    ignored = ["git", "check-ignore", "--quiet", str(target)]
    assert subprocess.run(ignored, cwd=ROOT).returncode == 0


def test_no_tracked_file_names_a_path_of_one_machine_or_has_torch_run_code_out_of_a_file():
    # other ways to run code out of a file are refused by `make lint`
    folders = "|".join(("work", "root", "home", "Users"))
    pattern = re.compile(rf"(?<![\w.$}}])/({folders})/[\w.]+|weights_only *= *False")
    for path in tracked():
        if path.suffix not in {".png", ".pth"} and path != Path(__file__):
            found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{found[0]} in {path.name}"


def test_no_committed_output_of_a_notebook_is_active():
    """Only text, plain tables, PNG and our own page: nothing else that a viewer would run."""
    page = '<iframe src="../outputs/checkpoints/best/draw.html" '
    shown = {"text/plain", "text/html", "text/markdown", "image/png"}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", ()):
                data = output.get("data", {})
                assert set(data) <= shown, path.name
                html = data.get("text/html", "").replace(page, "") + data.get("text/markdown", "")
                found = re.search(r"(?i)<script|<iframe|<object|javascript:|\son\w+=|src=", html)
                assert not found, f"{found and found[0]} in {path.name}"


def test_the_working_tree_stays_under_sixteen_megabytes():
    # of which about 4 are the ledger, 3 the notebooks and 3 the released networks and teachers
    assert sum(path.stat().st_size for path in tracked()) < 16_000_000
