"""The arrows between rooms: the linter passes here, and fails on an upward import, a sideways one and a circle."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]


def lint(folder):
    """The linter's exit code and output over the copy of the package in ``folder``."""
    path = os.pathsep.join([str(folder / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        LINT, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    """A checkout's package and linter settings, to spoil."""
    shutil.copytree(
        ROOT / "lib" / "ratiograph", tmp_path / "lib" / "ratiograph", ignore=shutil.ignore_patterns("assets")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_package_keeps_its_contracts(copy):
    code, said = lint(copy)
    assert code == 0, said
    assert "Contracts: 2 kept, 0 broken." in said


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        (
            "core/types.py",
            "import ratiograph.algebra.weightings",
            "ratiograph.core is not allowed to import ratiograph.algebra",
        ),
        (
            "algebra/times.py",
            "def lazy():\n    import ratiograph.data.stream",
            "ratiograph.algebra is not allowed to import ratiograph.data",
        ),
        (
            "reports/charts.py",
            "from ratiograph.evaluation import kid",
            "ratiograph.reports is not allowed to import ratiograph.evaluation",
        ),
        ("core/files.py", "from ratiograph.core import contracts\nfrom ratiograph.core import draws", None),
        (
            "algebra/weightings.py",
            "def lazy():\n    from ratiograph.algebra import normalization",
            "No cycles are allowed in ratiograph.algebra",
        ),
    ],
    ids=["upward", "sideways, inside a function", "between the top rooms", "downward or level is fine", "circle"],
)
def test_an_import_against_the_arrows_fails(copy, module, line, said):
    path = copy / "lib" / "ratiograph" / module
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    code, output = lint(copy)
    assert code == (0 if said is None else 1), output
    assert said is None or said in " ".join(output.split())


def test_few_modules_lie_outside_the_rooms():
    assert len(list((ROOT / "lib" / "ratiograph").glob("*.py"))) <= 3


def test_modules_have_names_of_their_own():
    modules = [*(ROOT / "lib").rglob("*.py"), *(ROOT / "tools").glob("*/*.py")]
    names = [path.name for path in modules if path.stem != "__init__"]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
