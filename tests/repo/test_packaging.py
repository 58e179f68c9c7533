"""What a stranger installs: dependencies, the lock, conda's environment, the files of CI."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUNTIME = PYPROJECT["project"]["dependencies"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^\S+==.*?(?=^\S|\Z)", LOCK, re.MULTILINE | re.DOTALL)


def requirements():
    """Return everything the project asks for, an extra named in another one taken apart."""
    listed = [*RUNTIME, *(line for lines in EXTRAS.values() for line in lines)]
    return [Requirement(line) for line in listed if not line.startswith("mnistlib[")]


each_requirement = pytest.mark.parametrize("wanted", requirements(), ids=lambda r: r.name)


@each_requirement
def test_every_direct_dependency_is_in_the_lock_and_in_the_conda_environment(wanted):
    pinned = re.findall(rf"^{wanted.name}==([^ \\]+)", LOCK, re.MULTILINE)
    assert pinned
    assert all(version in wanted.specifier for version in pinned)
    conda = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert re.search(rf"^ +- {wanted.name}[><=]", conda, re.MULTILINE)


def test_the_conda_environment_asks_for_what_pyproject_asks_for_and_nothing_else():
    conda = (ROOT / "environment.yml").read_text(encoding="utf-8")
    *listed, package = re.findall(r"^      - (.+)$", conda, re.MULTILINE)
    assert package == "-e ."
    assert len(listed) == len(set(listed))
    assert {str(Requirement(line)) for line in listed} == {str(r) for r in requirements()}
    assert f"- python {PYPROJECT['project']['requires-python']}" in conda


def test_the_lock_was_made_from_these_dependencies_and_no_others():
    """`uv pip compile` writes under each package who asked for it."""
    asked = {b.split("==")[0] for b in BLOCKS if "mnistlib (pyproject.toml)" in b}
    assert asked == {r.name for r in requirements()}, "run `make lock`"


def test_every_locked_package_has_a_hash_and_no_line_names_a_host():
    assert len(BLOCKS) > 100
    assert all("--hash=sha256:" in block for block in BLOCKS)
    assert "://" not in LOCK


def test_the_lock_has_no_release_with_a_known_remote_hole():
    for name, least in {"jupyter-server": (2, 20), "torch": (2, 10)}.items():
        for version in re.findall(rf"^{name}==([\d.]+)", LOCK, re.MULTILINE):
            assert tuple(map(int, version.split(".")[:2])) >= least


def test_what_not_everybody_needs_is_an_extra_that_the_tests_need_too():
    optional = {"notebooks", "dask", "export", "site", "browser"}
    assert set(EXTRAS) == optional | {"test"}
    assert f"mnistlib[{','.join(name for name in EXTRAS if name in optional)}]" in EXTRAS["test"]
    core = {Requirement(line).name for line in RUNTIME}
    assert not core & {Requirement(line).name for name in optional for line in EXTRAS[name]}


def test_every_folder_of_the_package_is_installed():
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "mnistlib").rglob("*.py")}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(
        ".".join(folder.parts) for folder in folders
    )
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_mypy_ignores_missing_types_of_named_packages_only():
    settings = PYPROJECT["tool"]["mypy"]
    loose = {"ignore_errors", "ignore_missing_imports", "follow_imports", "disable_error_code"}
    assert not loose & set(settings)
    for override in settings["overrides"]:
        assert set(override) == {"module", "ignore_missing_imports"}
        assert not [m for m in override["module"] if m == "*" or m.startswith("mnistlib")]


def test_github_actions_may_only_read_and_are_pinned_by_commit():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        assert re.search(r"^permissions:\n  contents: read$", text, re.MULTILINE)
        used = re.findall(r"uses: (\S+)", text)
        assert used
        assert all(re.search(r"@[0-9a-f]{40}$", action) for action in used)


def test_the_gate_is_the_same_here_and_on_github():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "run: .ci/run" in workflow
    for event in ("push", "pull_request"):
        assert f"  {event}:\n    branches: [main]" in workflow
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").endswith("make test\n")
    hook = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"entry: (.+)", hook) == ["make lint"]


def test_every_file_and_target_that_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w.-]+/[\w./-]*|\w+\.toml|\w+\.yml|\w+\.lock)`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`make (\w+)`", text)
    assert len(targets) > 5
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []
