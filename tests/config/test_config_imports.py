"""What a gin file asks to run: imports of modules, and commands in the place of data."""

import sys
from pathlib import Path

import pytest
import torch

from ratiograph import config
from ratiograph.config import tree

RUN = """
Experiment.task = @RatioTraining()
Experiment.steps = 1
Experiment.batch_size = 1
RatioTraining.teacher = @RingMixture()
RatioTraining.student = @RingMixture()
RatioTraining.ratio = @EncoderRatio()
RatioTraining.noising = @VarianceExploding()
RatioTraining.times = @KarrasIndex()
RatioTraining.optimizer = @Adam()
EncoderRatio.network = @MLP()
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported, and a folder with a configuration that asks for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("planted.py").write_text("from pathlib import Path\nPath('trace').write_text('')\n__all__ = []\n")
    Path("run").mkdir()
    Path("run/config.gin").write_text("import planted\n" + RUN)
    yield tmp_path
    sys.modules.pop("planted", None)


def test_a_file_runs_no_code_of_its_own_choice(planted):
    for files in (["run/config.gin"], ["mine.gin"]):
        Path("mine.gin").write_text("include 'run/config.gin'\n")
        with pytest.raises(config.ConfigError, match=r"run/config.gin:1: the file asks.*--gin_param='import planted'"):
            config.parse(files)
    Path("flag --x").mkdir()  # a folder's name does not make its files the command line's
    Path("run/config.gin").rename("flag --x/config.gin")
    with pytest.raises(config.ConfigError, match=r"config.gin:?1?: the file asks to run code"):
        config.parse(["flag --x/config.gin"])
    assert not Path("trace").exists()


@pytest.mark.parametrize("value", ["'pipe:touch trace'", "'x.tar::pipe:touch trace'", "'x.tar:: pipe:touch trace'"])
@pytest.mark.parametrize("line", ["DATA = {}", "ShardStream.urls = {}"])
def test_a_file_runs_no_command_unless_the_command_line_names_it(value, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("flag --x").mkdir()
    saved = Path("flag --x/config.gin")
    saved.write_text(f"include 'gin/mnist_sba.gin'\n{line.format(value)}\n")
    Path("outer.gin").write_text(f"include '{saved}'\n")
    for file in (saved, "outer.gin"):
        with pytest.raises(config.ConfigError, match=r"the file asks to run a command, 'pipe:touch trace'"):
            config.parse([str(file)])
    config.parse([str(saved)], [line.format("'mnist'")])
    config.parse([str(saved)], [line.format(value)])
    assert not Path("trace").exists()


def test_what_the_command_line_names_is_imported(planted):
    cfg = config.parse(["run/config.gin"], ["import planted"])
    assert cfg.imports == ("planted",)
    assert Path("trace").exists()


def test_comparing_with_a_folder_s_configuration_imports_nothing(planted):
    Path("mine.gin").write_text(RUN.replace("batch_size = 1", "batch_size = 2"))
    cfg = config.parse(["mine.gin"])
    assert "Experiment.batch_size is 1 there and 2 here" in map(str, config.changes(cfg, "run/config.gin"))
    assert not Path("trace").exists()


def test_a_file_may_import_what_the_program_knows(planted):
    Path("run/config.gin").write_text("import ratiograph.algebra.times\n" + RUN)
    config.parse(["run/config.gin"])


OWN = """
from ratiograph.algebra.weightings import Weighting
__all__ = ["Tempered{n}"]
class Tempered{n}(Weighting):
    def __init__(self, *, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature
    def log_weight(self, log_ratio, t):
        return log_ratio / self.temperature
"""


def module_of(folder, monkeypatch, name, text):
    monkeypatch.syspath_prepend(str(folder))
    (folder / f"{name}.py").write_text(text)


def test_a_component_of_ones_own_is_known_once_it_was_imported_and_drawn(tmp_path, monkeypatch):
    module_of(tmp_path, monkeypatch, "own_weightings", OWN.format(n=1))
    lines = ["import own_weightings", "WEIGHTING = @Tempered1()", "Tempered1.temperature = 2.5"]
    cfg = config.parse(["gin/mnist_sba.gin"], lines)
    saved = tmp_path / "config.gin"
    config.save(cfg, saved)
    with torch.device("meta"):
        again = config.build(config.parse([str(saved)]))  # this program ran the module already
    text = tree.render_tree(tree.describe(again))
    assert "weighting: Tempered1  temperature=2.5" in text
    assert tree.describe(torch.nn.ReLU()).children == ()
    assert not config.is_component(torch.nn.ReLU)


MISTAKES = {
    "own_syntax": ("__all__ = [", r"own_syntax\.py:1: SyntaxError: '\[' was never closed"),
    "own_name": ("__all__ = []\nx = undefined\n", r"own_name\.py:2: NameError: name 'undefined' is not defined"),
    "own_exit": ("def f():\n    return 1 / 0\nf()\n", r"own_exit\.py:2 \(in f\): ZeroDivisionError: division by zero"),
    "own_missing": ("__all__ = ['A']\n", r"own_missing lists 'A' in its __all__ and does not define it"),
}


@pytest.mark.parametrize("module", MISTAKES)
def test_a_mistake_in_a_module_of_ones_own_is_one_line_with_its_place(module, tmp_path, monkeypatch):
    text, message = MISTAKES[module]
    module_of(tmp_path, monkeypatch, module, text)
    with pytest.raises(config.ConfigError, match=message) as raised:
        config.parse(["gin/mnist_sba.gin"], [f"import {module}"])
    assert "\n" not in str(raised.value)


def test_a_module_that_registers_nothing_or_a_taken_name_or_is_not_there_says_so(tmp_path, monkeypatch):
    module_of(tmp_path, monkeypatch, "own_unlisted", "class Mine:\n    pass\n")
    module_of(tmp_path, monkeypatch, "own_taken", "__all__ = ['KL']\nclass KL:\n    pass\n")
    module_of(tmp_path, monkeypatch, "own_needing", "import no_such_package_here\n")
    for module, message in {
        "own_unlisted": "own_unlisted has no __all__, the list of names that gin files may use: add it.",
        "own_taken": "own_taken has a component KL, which is the name of one of ratiograph.algebra.weightings: call it "
        "something else.",
        "own_absent": "cannot import own_absent: No module named 'own_absent'. Put the folder that it lies in on "
        "PYTHONPATH.",
        "own_needing": "cannot import own_needing: No module named 'no_such_package_here'.",
    }.items():
        with pytest.raises(config.ConfigError) as raised:
            config.parse(["gin/mnist_sba.gin"], [f"import {module}"])
        assert str(raised.value) == f"flag --gin_param 'import {module}': {message}"


HEAD = """
from __future__ import annotations
import math
from dataclasses import dataclass
from typing import Annotated
import annotated_types as at
from ratiograph.algebra.weightings import Weighting
__all__ = ["Own"]
"""
DECLARED = {
    "own_unit": ("Annotated[float, at.Unit('m')]", "Own.a: its annotation has Unit(unit='m'): a marker that is not"),
    "own_zone": ("list[Annotated[int, at.Timezone(None)]] | None", "Own.a: its annotation has Timezone(tz=None): a"),
    "own_word": ("Annotated[float, at.Gt('a')]", "Own.a: its annotation has Gt(gt='a'): the bound is no number."),
    "own_part": (
        "Annotated[float, at.Interval(le='b')]",
        "Own.a: its annotation has Le(le='b'): the bound is no number.",
    ),
    "own_zero": (
        "Annotated[int, at.MultipleOf(0)]",
        "Own.a: its annotation has MultipleOf(multiple_of=0): the unit is no",
    ),
    "own_below": (
        "Annotated[float, at.Gt(0)] = -1.0",
        "Own.a: its default -1.0 is not a finite number above 0, which it",
    ),
    "own_inf": ("float = math.inf", "Own.a: its default inf is not float, which it takes: numbers are finite."),
    "own_attribute": ("math.nothing", "Own.a: its annotation math.nothing cannot be evaluated: AttributeError: module"),
}


@pytest.mark.parametrize("module", DECLARED)
def test_a_declaration_that_cannot_be_checked_names_class_and_parameter(module, tmp_path, monkeypatch):
    annotation, message = DECLARED[module]
    module_of(
        tmp_path, monkeypatch, module, f"{HEAD}class Own:\n    def __init__(self, *, a: {annotation}):\n        pass\n"
    )
    for _ in range(2):  # a second try says the same
        with pytest.raises(config.ConfigError) as raised:
            config.parse(["gin/mnist_sba.gin"], [f"import {module}"])
        assert str(raised.value).startswith(f"flag --gin_param 'import {module}': {message}")
        assert "\n" not in str(raised.value)


def test_markers_of_other_libraries_and_names_for_type_checkers_are_ignored(tmp_path, monkeypatch):
    text = f"""{HEAD.replace("Own", "Lenient")}
class Lenient(Weighting):
    def __init__(self, *, a: Annotated[float, "words", at.doc("more")] = 1.0, b: NotImported = 3, c: float = None):
        super().__init__()
"""
    module_of(tmp_path, monkeypatch, "own_lenient", text)
    cfg = config.parse(["gin/mnist_sba.gin"], ["import own_lenient", "WEIGHTING = @Lenient()", "Lenient.a = -2.0"])
    assert config.to_dict(cfg)["Lenient.a"] == -2.0


def test_what_a_component_of_ones_own_raises_is_told_with_its_line(tmp_path, monkeypatch):
    text = f"{HEAD.replace('Own', 'Raising')}class Raising(Weighting):\n    def __init__(self, *, how: str):\n"
    text += "        super().__init__()\n        {'key': lambda: {}['b'], 'name': lambda: self.nothing}[how]()\n"
    module_of(tmp_path, monkeypatch, "own_raising", text)
    lines = ["import own_raising", "WEIGHTING = @Raising()"]
    for how, error in {
        "key": "KeyError: 'b'",
        "name": "AttributeError: 'Raising' object has no attribute 'nothing'",
    }.items():
        with pytest.raises(config.ConfigError) as raised, torch.device("meta"):
            config.build(config.parse(["gin/mnist_sba.gin"], [*lines, f"Raising.how = '{how}'"]))
        place = f"{tmp_path / 'own_raising.py'}:12 (in <lambda>)"
        assert f"= @Raising(): cannot be built with these values: {place}: {error}" in str(raised.value)


def test_a_dataclass_that_torch_cannot_hash_says_what_to_write(tmp_path, monkeypatch):
    text = f"{HEAD.replace('Own', 'Equal')}@dataclass(kw_only=True)\nclass Equal(Weighting):\n    a: float = 1.0\n"
    module_of(tmp_path, monkeypatch, "own_equal", text)
    with pytest.raises(config.ConfigError, match=r"own_equal: Equal compares by value, .*@dataclass\(eq=False\)"):
        config.parse(["gin/mnist_sba.gin"], ["import own_equal"])


@pytest.mark.parametrize("line", ["TOKEN = abc secret", "secret", "{'a': [secret", 'x = """secret'])
def test_lines_of_a_file_that_is_no_gin_file_are_not_quoted(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("passwords").write_text(f"\n{line}\n")
    Path("outer.gin").write_text("include 'passwords'\n")
    for file in ("passwords", "outer.gin"):
        with pytest.raises(config.ConfigError, match=r"^passwords:\d: ") as raised:
            config.parse([file])
        assert "secret" not in str(raised.value)
    Path("shown.gin").write_text("\nTOKEN = abc secret\n")
    with pytest.raises(config.ConfigError, match=r"shown\.gin:2: .*`TOKEN = abc secret`"):
        config.parse(["shown.gin"])


def test_lines_that_are_not_trusted_are_read_between_files_and_flags():
    lines = {"some.toml": ["SBA.lam = 2.0", "Experiment.steps = 7"]}
    values = config.to_dict(config.parse(["gin/mnist_sba.gin"], ["SBA.lam = 4.0"], untrusted=lines))
    assert (values["SBA.lam"], values["Experiment.steps"]) == (4.0, 7)
    with pytest.raises(config.ConfigError, match=r"^some\.toml, 'SBA\.lm = 1': SBA has no parameter 'lm'"):
        config.parse(["gin/mnist_sba.gin"], untrusted={"some.toml": ["SBA.lm = 1"]})


def test_a_value_of_the_wrong_type_names_the_macro_s_own_line():
    with pytest.raises(config.ConfigError) as raised:
        config.parse(["gin/mnist_sba.gin"], ["WEIGHTING = @UNet()"])
    assert str(raised.value).endswith(
        "Clamped.weighting takes Weighting, not @UNet(), which builds a UNet. %WEIGHTING is set in flag --gin_param "
        "'WEIGHTING = @UNet()'."
    )


@pytest.mark.parametrize("name", ["gin/mnist_sab.gin", "mnist_sba.gin"])
def test_a_missing_file_s_suggestion_can_be_typed_as_it_stands(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    with pytest.raises(config.ConfigError, match=r"Did you mean 'gin/mnist_sba\.gin'\?"):
        config.parse([name])
