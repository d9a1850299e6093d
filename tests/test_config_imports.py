"""The imports of a saved configuration."""

import sys
from pathlib import Path

import pytest

from ratiograph import config

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


def test_a_saved_configuration_runs_no_code_of_its_own_choice(planted):
    for files in (["run/config.gin"], ["mine.gin"]):
        Path("mine.gin").write_text("include 'run/config.gin'\n")
        with pytest.raises(config.ConfigError, match=r"run/config.gin:1: a saved.*--gin_param='import planted'"):
            config.parse(files)
    Path("run/other.gin").write_text("import planted\n" + RUN)
    Path("run/config.gin").write_text("include 'other.gin'\n")
    with pytest.raises(config.ConfigError, match=r"run/other.gin:1: a saved configuration asks to run code"):
        config.parse(["run/config.gin"])
    Path("run/config.gin").unlink()
    Path("run/config.gin").symlink_to("other.gin")
    with pytest.raises(config.ConfigError, match=r"run/other.gin:1: a saved configuration asks to run code"):
        config.parse(["run/config.gin"])
    assert not Path("trace").exists()


def test_what_the_command_line_names_is_imported(planted):
    cfg = config.parse(["run/config.gin"], ["import planted"])
    assert cfg.imports == ("planted",)
    assert Path("trace").exists()


def test_a_file_of_ones_own_may_import(planted):
    Path("run/config.gin").rename("mine.gin")
    config.parse(["mine.gin"])
    assert Path("trace").exists()


def test_comparing_with_a_folder_s_configuration_imports_nothing(planted):
    Path("mine.gin").write_text(RUN.replace("steps = 1", "steps = 2"))
    cfg = config.parse(["mine.gin"])
    assert "Experiment.steps is 1 there and 2 here" in config.differences(cfg, "run/config.gin")
    assert not Path("trace").exists()


def test_a_saved_configuration_may_import_what_the_program_knows(planted):
    Path("run/config.gin").write_text("import ratiograph.times\n" + RUN)
    config.parse(["run/config.gin"])
