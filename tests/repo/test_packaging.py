"""What a stranger installs: dependencies, the lock, conda's environment, the files of CI."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUNTIME = PYPROJECT["project"]["dependencies"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
LISTED = [*RUNTIME, *(line for lines in EXTRAS.values() for line in lines)]
# everything the project asks for; an extra named in another one is taken apart
REQUIREMENTS = [Requirement(line) for line in LISTED if not line.startswith("mnistlib[")]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^\S+==.*?(?=^\S|\Z)", LOCK, re.MULTILINE | re.DOTALL)


def test_the_conda_environment_asks_for_what_pyproject_asks_for_and_nothing_else():
    conda = (ROOT / "environment.yml").read_text(encoding="utf-8")
    *listed, package = re.findall(r"^      - (.+)$", conda, re.MULTILINE)
    assert package == "-e ."
    assert sorted(str(Requirement(line)) for line in listed) == sorted(map(str, REQUIREMENTS))
    assert f"- python {PYPROJECT['project']['requires-python']}" in conda


def test_the_lock_was_made_from_these_dependencies_and_no_others():
    """`uv pip compile` writes under each package who asked for it."""
    asked = {b.split("==")[0] for b in BLOCKS if "mnistlib (pyproject.toml)" in b}
    assert asked == {r.name for r in REQUIREMENTS}, "run `make lock`"
    for wanted in REQUIREMENTS:
        pinned = re.findall(rf"^{wanted.name}==([^ \\]+)", LOCK, re.MULTILINE)
        assert all(version in wanted.specifier for version in pinned), "run `make lock`"


def test_every_locked_package_has_a_hash_no_line_names_a_host_and_none_has_a_known_remote_hole():
    assert all("--hash=sha256:" in block for block in BLOCKS)
    assert "://" not in LOCK
    for name, least in {"jupyter-server": (2, 20), "torch": (2, 10)}.items():
        for version in re.findall(rf"^{name}==([\d.]+)", LOCK, re.MULTILINE):
            assert tuple(map(int, version.split(".")[:2])) >= least


def test_what_not_everybody_needs_is_an_extra_that_the_tests_need_too():
    optional = [name for name in EXTRAS if name != "test"]
    assert f"mnistlib[{','.join(optional)}]" in EXTRAS["test"]
    core = {Requirement(line).name for line in RUNTIME}
    assert not core & {Requirement(line).name for name in optional for line in EXTRAS[name]}


def test_github_actions_may_only_read_and_are_pinned_by_commit():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
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


def test_every_file_and_target_that_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w.-]+/[\w./-]*|\w+\.toml|\w+\.yml|\w+\.lock)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`make (\w+)`", text)
    assert min(len(named), len(targets)) > 5
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []
