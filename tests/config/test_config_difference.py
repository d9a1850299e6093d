"""config_difference.py: configurations are compared by what they mean."""

import re

import pytest

from ratiograph import config
from ratiograph.config.differences import ABSENT, differences, full_bindings, read_bindings
from ratiograph.config.values import ConfigError, Reference

PLAIN = """
Experiment.steps = 100
Experiment.task = @Distillation()
Term.weighting = @SBA()
SBA.lam = 0.5
student/Adam.lr = 1e-4
student/Adam.betas = (0.0, 0.999)
Objective.terms = {'a': @Term(), 'b': @gan/Term()}
Distillation.recompute = False
"""
REWRITTEN = """
# the same in other words
LR = 0.0001
LAM = 0.5
OMEGA = @SBA()
Distillation.recompute = False
Objective.terms = {'b': @gan/Term(), 'a': @Term()}
student/Adam.betas = [0, 0.999]
student/Adam.lr = %LR
SBA.lam = %LAM
Term.weighting = %OMEGA
Experiment.task = @Distillation()
Experiment.steps = 100
"""


def bindings(tmp_path, text):
    path = tmp_path / "config.gin"
    path.write_text(text)
    return read_bindings(path)


def test_what_is_written_otherwise_and_means_the_same_is_no_difference(tmp_path):
    assert differences({"a": bindings(tmp_path, PLAIN), "b": bindings(tmp_path, REWRITTEN)}) == []


@pytest.mark.parametrize(
    ("line", "changed", "name", "values"),
    [
        ("SBA.lam = 0.5", "SBA.lam = 3.0", "SBA.lam", ("0.5", "3.0")),
        ("(0.0, 0.999)", "(0.9, 0.999)", "student/Adam.betas", ("(0.0, 0.999)", "(0.9, 0.999)")),
        ("'b': @gan", "'b': @other", "Objective.terms", None),
        ("recompute = False", "recompute = 0", "Distillation.recompute", ("False", "0")),
        ("@SBA()", "@KL()", "Term.weighting", ("@SBA()", "@KL()")),
    ],
)
def test_a_changed_value_is_the_one_difference(tmp_path, line, changed, name, values):
    found = differences({"a": bindings(tmp_path, PLAIN), "b": bindings(tmp_path, PLAIN.replace(line, changed))})
    assert [one.name for one in found] == [name]
    assert values in (None, found[0].values)


def test_three_runs_one_of_which_lacks_the_component(tmp_path):
    without = re.sub(r"SBA.lam.*\n", "", PLAIN).replace("@SBA()", "@KL()")
    runs = {
        "a": bindings(tmp_path, PLAIN),
        "b": bindings(tmp_path, without),
        "c": bindings(tmp_path, PLAIN.replace("= 100", "= 200")),
    }
    found = [(one.name, one.values) for one in differences(runs)]
    assert found == [  # Experiment comes first
        ("Experiment.steps", ("100", "100", "200")),
        ("Term.weighting", ("@SBA()", "@KL()", "@SBA()")),
        ("SBA.lam", ("0.5", ABSENT, "0.5")),
    ]


def test_an_older_file_without_a_parameter_means_its_default(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        config.save(config.parse(["gin/mnist_sba.gin"]), tmp_path / name / "config.gin")
    old = tmp_path / "old" / "config.gin"
    text = old.read_text()
    assert "Experiment.keep_every = 0\n" in text
    old.write_text(text.replace("Experiment.keep_every = 0\n", ""))
    runs = {name: full_bindings(tmp_path / name / "config.gin") for name in ("old", "new")}
    assert differences(runs) == []
    old.write_text(old.read_text() + "Experiment.keep_every = 7\n")
    (found,) = differences({name: full_bindings(tmp_path / name / "config.gin") for name in ("old", "new")})
    assert (found.name, found.values) == ("Experiment.keep_every", ("7", "0"))


def test_a_file_of_unknown_components_is_read_as_it_stands(tmp_path):
    path = tmp_path / "config.gin"
    path.write_text("import no.such.module\nElsewhere.size = 3\nElsewhere.part = @Other()\n")
    assert full_bindings(path) == {"Elsewhere.size": 3, "Elsewhere.part": Reference("", "Other")}


@pytest.mark.parametrize("text", ["Experiment.steps = \n", "A.b = %MISSING\n", "A.b = [1, \n"])
def test_a_damaged_file_is_named(tmp_path, text):
    with pytest.raises(ConfigError, match=r"config\.gin"):
        bindings(tmp_path, text)
