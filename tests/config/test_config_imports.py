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
