"""The gin edge on stand-in components: what parses means what it says, and every mistake is one clear error."""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratiograph import config
from ratiograph.config import ConfigError, configuration
from ratiograph.config.components import components, load_components
from ratiograph.config.reader import parse_text
from ratiograph.config.signatures import accepts
from ratiograph.config.values import Reference, literal, writable
from ratiograph.core.domains import OrInfinite


class ToyWeighting:
    """Base class of the stand-ins."""


@dataclass(kw_only=True)
class ToyPower(ToyWeighting):
    lam: float
    limit: Annotated[float, OrInfinite()] = float("inf")

    def __post_init__(self):
        if self.lam < -1:
            raise ValueError(f"lam={self.lam} must be at least -1")


@dataclass(kw_only=True)
class ToyUniform(ToyWeighting):
    pass


@dataclass(kw_only=True)
class ToyNet:
    width: int = 8
    channels: tuple[int, ...] = (1, 2)
    mode: Literal["mean", "max"] = "mean"


@dataclass(kw_only=True)
class ToyCritic:
    net: ToyNet
    name: str | None = None


@dataclass(kw_only=True)
class ToyTerm:
    weighting: ToyWeighting
    coefficient: float = 1.0


class ToySized(Protocol):
    def size(self) -> int: ...


class ToySource:
    def __init__(self, *, urls: str, folds: Mapping[str, int] | None = None):
        self.urls, self.folds = urls, folds

    def size(self) -> int:
        return len(self.urls)


def toy_halved(*, value: float) -> float:
    return value / 2


@dataclass(kw_only=True)
class ToyRun:
    harmless: ClassVar[frozenset[str]] = frozenset({"steps"})
    terms: Sequence[ToyTerm] = ()
    teacher: ToyCritic | None = None
    critic: ToyCritic | None = None
    data: ToySized | None = None
    factory: Callable[[], ToyNet] | None = None
    rate: float = 0.5
    steps: int


@dataclass(kw_only=True)
class ToyLoop:
    inner: "ToyLoop"


config.register(ToyPower, ToyUniform, ToyNet, ToyCritic, ToyTerm, ToySource, toy_halved, ToyRun, ToyLoop)

BASE = """
DATA = 'mnist'
ToyRun.steps = 10
ToyRun.data = @ToySource()
ToySource.urls = %DATA
ToyRun.teacher = @teacher/ToyCritic()
ToyRun.critic = @critic/ToyCritic()
ToyCritic.net = @ToyNet()
ToyNet.width = 16
critic/ToyNet.width = 4
ToyRun.terms = [@main/ToyTerm(), @extra/ToyTerm()]
main/ToyTerm.weighting = @ToyPower()
ToyPower.lam = 0.5
extra/ToyTerm.weighting = @ToyUniform()
extra/ToyTerm.coefficient = 2
"""


@pytest.fixture(autouse=True)
def stand_ins_only(monkeypatch):
    monkeypatch.setattr(configuration, "load_components", lambda: None)


def write(folder, text, name="run.gin"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """parse(text, *bindings, **overrides) with text in run.gin, which is where paths in messages start."""
    monkeypatch.chdir(tmp_path)

    def parse(text, *bindings, overrides=None, root="ToyRun"):
        return config.parse([write(tmp_path, text)], bindings, overrides or {}, root=root)

    return parse


def test_scopes_macros_defaults_and_overrides_reach_the_components(parse):
    run = config.build(parse(BASE, "ToyPower.lam = 3", overrides={"ToyRun.steps": 7, "DATA": "other"}))
    assert (run.steps, run.rate) == (7, 0.5)
    assert (run.teacher.net.width, run.critic.net.width) == (16, 4)
    assert run.data.urls == "other"
    assert run.terms == [ToyTerm(weighting=ToyPower(lam=3)), ToyTerm(weighting=ToyUniform(), coefficient=2)]
    assert type(run.terms[0].weighting) is ToyPower  # the class itself, not a wrapper of gin's


def test_every_use_builds_a_new_object(parse):
    text = BASE + "NET = @ToyNet()\nToyCritic.net = %NET\n"
    run = config.build(parse(text))
    assert run.teacher.net is not run.critic.net
    # a macro is its text: the net is built in the scope of the critic that uses it
    assert (run.teacher.net.width, run.critic.net.width) == (16, 4)


def test_functions_blocks_and_nested_scopes(parse):
    text = "ToyRun:\n  steps = 3\n  rate = @a/b/toy_halved()\ntoy_halved.value = 1.0\na/b/toy_halved.value = 5.0\n"
    assert config.build(parse(text)).rate == 2.5


def test_an_unbuilt_reference_is_a_factory(parse):
    run = config.build(parse("ToyRun.steps = 1\nToyRun.factory = @ToyNet\nToyNet.width = 3\n"))
    assert run.factory() == ToyNet(width=3)


# --- files


def test_includes_are_found_from_anywhere_and_read_once(tmp_path, monkeypatch):
    write(tmp_path, "ToyRun.steps = 1\nToyRun.rate = 0.1\n", "gin/base/b.gin")
    write(tmp_path, "include 'base/b.gin'\nToyRun.steps = 2\n", "gin/one.gin")
    write(tmp_path, "include 'base/b.gin'\nToyRun.rate = 0.2\n", "gin/papers/x/two.gin")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    files = ["../gin/one.gin", str(tmp_path / "gin/papers/x/two.gin")]
    run = config.build(config.parse(files, [], {}, root="ToyRun"))
    assert (run.steps, run.rate) == (2, 0.2)  # the second mention of base/b.gin did not reset steps


def test_saved_configuration_parses_to_itself(parse, tmp_path):
    cfg = parse(BASE, "ToySource.folds = {'a': 1, 'b': 2}", "ToyNet.channels = (3,)")
    config.save(cfg, tmp_path / "config.gin")
    again = config.parse([str(tmp_path / "config.gin")], [], {}, root="ToyRun")
    assert config.to_dict(again) == config.to_dict(cfg)
    config.save(again, tmp_path / "again.gin")
    assert (tmp_path / "again.gin").read_text() == (tmp_path / "config.gin").read_text()
    first, second = config.build(cfg), config.build(again)
    assert (first.terms, first.critic, first.teacher) == (second.terms, second.critic, second.teacher)
    assert second.data.folds == {"a": 1, "b": 2}
    assert second.terms[0].weighting.limit == float("inf")
    assert config.changes(again, tmp_path / "config.gin") == []


def test_saved_configuration_holds_defaults_and_keeps_macros(parse, tmp_path):
    config.save(parse(BASE), tmp_path / "config.gin")
    lines = (tmp_path / "config.gin").read_text().splitlines()
    assert lines[0] == "DATA = 'mnist'"
    for line in ("ToyRun.rate = 0.5", "teacher/ToyNet.width = 16", "critic/ToyNet.width = 4"):
        assert line in lines
    moved = config.parse([str(tmp_path / "config.gin")], [], {"DATA": "moved"}, root="ToyRun")
    assert config.build(moved).data.urls == "moved"


def test_differences_names_the_first_binding(parse, tmp_path):
    config.save(parse(BASE), tmp_path / "config.gin")
    other = parse(BASE, "ToyPower.lam = 2.0", overrides={"ToyRun.steps": 20})
    assert [str(change) for change in config.changes(other, tmp_path / "config.gin")] == [
        "main/ToyPower.lam is 0.5 there and 2.0 here"
    ]


def test_a_parameter_that_an_older_file_leaves_out_has_its_default_there(parse, tmp_path):
    saved = tmp_path / "config.gin"
    config.save(parse(BASE), saved)
    older = [line for line in saved.read_text().splitlines() if not line.startswith("main/ToyPower.limit")]
    assert len(older) == len(saved.read_text().splitlines()) - 1
    saved.write_text("\n".join(older) + "\n")
    assert config.changes(parse(BASE), saved) == []
    assert [str(change) for change in config.changes(parse(BASE, "ToyPower.limit = 3.0"), saved)] == [
        "main/ToyPower.limit is 1e999 there and 3.0 here"
    ]


def test_to_dict_is_flat_and_plain(parse):
    flat = config.to_dict(parse(BASE))
    assert flat["critic/ToyNet.width"] == 4
    assert flat["ToySource.urls"] == "%DATA"
    assert flat["ToyRun.terms"] == ["@main/ToyTerm()", "@extra/ToyTerm()"]


# --- mistakes: (text, extra line, what the message must hold)

MISTAKES = {
    "misspelt component": (
        BASE + "ToyPowr.lam = 1",
        "run.gin:16: there is no component 'ToyPowr'. Did you mean 'ToyPower'?",
    ),
    "component in another case": (BASE + "toypower.lam = 1", "Did you mean 'ToyPower'?"),
    "misspelt reference": (
        BASE + "main/ToyTerm.weighting = @ToyUnifrom()",
        "run.gin:16: main/ToyTerm.weighting = @ToyUnifrom(): there is no component 'ToyUnifrom'. "
        "Did you mean 'ToyUniform'?",
    ),
    "misspelt parameter": (
        BASE + "ToyNet.widht = 3",
        "run.gin:16: ToyNet has no parameter 'widht'. Did you mean 'width'?",
    ),
    "parameter of a component without any": (
        BASE + "ToyUniform.lam = 3",
        "ToyUniform has no parameter 'lam'. It takes none.",
    ),
    "misspelt scope in a binding": (
        BASE + "critc/ToyNet.width = 3",
        "run.gin:16: critc/ToyNet.width is never used: no reference in use enters the scope 'critc'. "
        "Did you mean 'critic/ToyNet.width'?",
    ),
    "scope that does not hold the component": (
        BASE + "main/ToyNet.width = 3",
        "ToyNet is not built in the scope 'main', only as: teacher/ToyNet, critic/ToyNet.",
    ),
    "misspelt macro in a value": (
        BASE + "ToySource.urls = %DTA",
        "run.gin:16: no line defines the macro %DTA. Did you mean 'DATA'? Define it with a line `DTA = ...`.",
    ),
    "unused macro": (BASE + "TEACHER = 3", "run.gin:16: TEACHER is a macro that nothing uses. Write %TEACHER where"),
    "misspelt macro": (BASE + "DTA = 3", "run.gin:16: DTA is a macro that nothing uses. Did you mean 'DATA'?"),
    "macros in a circle": (BASE + "A = %B\nB = [%A]\nToySource.urls = %A", "%A -> %B -> %A goes round in a circle"),
    "component used as a macro": (BASE + "ToyNet = 3", "'ToyNet' is a component; write `ToyNet.<parameter> = ...`."),
    "string for a number": (BASE + "ToyNet.width = '3'", "run.gin:16: ToyNet.width takes int, not '3' (str)."),
    "float for an int": (BASE + "ToyRun.steps = 1e3", "ToyRun.steps takes int, not 1000.0 (float)."),
    "bool for an int": (BASE + "ToyNet.width = True", "ToyNet.width takes int, not True (bool)."),
    "None where it is not allowed": (BASE + "ToyNet.width = None", "ToyNet.width takes int, not None (NoneType)."),
    "wrong choice": (
        BASE + "ToyNet.mode = 'meen'",
        "ToyNet.mode takes 'mean' or 'max', not 'meen' (str). Did you mean 'mean'?",
    ),
    "wrong element": (BASE + "ToyNet.channels = (1, 'a')", "ToyNet.channels takes tuple of int, not (1, 'a') (tuple)."),
    "wrong element of a mapping": (BASE + "ToySource.folds = {'a': 'b'}", "takes dict of str to int or None"),
    "wrong type through a macro": (
        BASE + "W = 'wide'\nToyNet.width = %W",
        "run.gin:17: ToyNet.width takes int, not 'wide'",
    ),
    "component of another kind": (
        BASE + "ToyCritic.net = @ToyUniform()",
        "ToyCritic.net takes ToyNet, not @ToyUniform(), which builds a ToyUniform.",
    ),
    "component of another kind in a list": (BASE + "ToyRun.terms = [@ToyNet()]", "ToyRun.terms takes list of ToyTerm"),
    "object without the protocol": (BASE + "ToyRun.data = @ToyNet()", "ToyRun.data takes ToySized or None"),
    "function of another type": (BASE + "ToyCritic.net = @toy_halved()", "which builds a float"),
    "component where a number belongs": (BASE + "ToyRun.rate = @ToyNet()", "ToyRun.rate takes float, not @ToyNet()"),
    "forgotten parentheses": (BASE + "ToyCritic.net = @ToyNet", "not the unbuilt @ToyNet. Write `@ToyNet()`."),
    "binding of a component that is not there": (
        "ToyRun.steps = 1\nToyPower.lam = 1.0",
        "run.gin:2: ToyPower.lam is never used: the graph has no ToyPower.",
    ),
    "binding after the line that removed its component": (
        BASE + "main/ToyTerm.weighting = @ToyUniform()\nToyPower.lam = 1.0",
        "run.gin:17: ToyPower.lam is never used",
    ),
    "line that more specific ones win over": (
        BASE + "teacher/ToyNet.width = 2\nToyNet.width = 3",
        "run.gin:17: ToyNet.width has no effect: more specific lines win over it wherever ToyNet is built: "
        "teacher/ToyNet.width (run.gin:16), critic/ToyNet.width (run.gin:10).",
    ),
    "missing value of the root": (
        "ToyRun.rate = 1",
        "the root ToyRun: the required ToyRun.steps has no value. Add a line `ToyRun.steps = <int>`, or give the "
        "flag --steps.",
    ),
    "missing value in a scope": (
        BASE + "extra/ToyTerm.weighting = @other/ToyCritic()\nToyTerm.weighting = @ToyPower()",
        "takes ToyWeighting, not @other/ToyCritic()",
    ),
    "missing value below": (
        "ToyRun.steps = 1\nToyRun.terms = [@a/ToyTerm()]",
        "run.gin:2: ToyRun.terms = @a/ToyTerm(): the required ToyTerm.weighting has no value. "
        "Add a line `a/ToyTerm.weighting = <ToyWeighting>`.",
    ),
    "value marked as required": ("ToyRun.steps = %gin.REQUIRED", "the required ToyRun.steps has no value"),
    "missing include": ("include 'bse.gin'", "run.gin:1: there is no file 'bse.gin'."),
    "missing bracket": ("ToyNet.channels = (1,\n", "run.gin:"),
    "no value": ("ToyRun.steps =\n", "run.gin:1: cannot read `ToyRun.steps =`"),
    "string without quotes": (
        "ToyRun.steps = 1\nDATA = mnist",
        "run.gin:2: cannot read the value in `DATA = mnist`. Write 'mnist' for a string, @mnist() for a component, "
        "%mnist for a macro.",
    ),
    "expression": ("ToyRun.rate = 1/2", "run.gin:1: cannot read `ToyRun.rate = 1/2`: the value is followed by more."),
    "word of another language": ("ToyRun.rate = true", "cannot read the value in `ToyRun.rate = true`. Write True."),
    "include without quotes": (
        "include a.gin",
        "run.gin:1: cannot read `include a.gin`. Write include 'folder/file.gin'",
    ),
    "dict with a list for a key": ("ToySource.folds = {[1]: 2}", "run.gin:1: unhashable type: 'list': a dict's keys"),
    "open string": ('A = """x', "run.gin:1: a bracket or a string is not closed."),
    "scope without a parameter": ("a/ToyNet = 3", "run.gin:1: 'a/ToyNet' names no parameter"),
    "module that is not there": ("import no_such_module_here", "run.gin:1: the file asks to run code, import no_such"),
    "brackets in brackets": ("A = " + 40 * "[" + 40 * "]", "run.gin:1: a value nests more than 32 brackets."),
    "brackets without end": ("A = " + 3000 * "[" + 3000 * "]", "run.gin:1: a value nests too many brackets."),
    "too long a number": ("A = 0x" + 5000 * "f", "run.gin:1: a whole number has more than 64 bits."),
    "constructor refuses": (
        BASE + "ToyPower.lam = -2",
        "run.gin:12: main/ToyTerm.weighting = @main/ToyPower(): lam=-2 must be",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named_with_its_place_and_remedy(name, parse):
    text, message = MISTAKES[name]
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        config.build(parse(text))
    assert "\n" not in str(caught.value)


def test_component_that_builds_itself(parse):
    with pytest.raises(ConfigError, match=r"run.gin:1: ToyLoop.inner builds itself: @ToyLoop\(\) -> @ToyLoop\(\)"):
        parse("ToyLoop.inner = @ToyLoop()", root="ToyLoop")


def test_mistakes_in_flags_name_the_flag(parse):
    with pytest.raises(ConfigError, match=r"^flag --gin_param 'ToyPower.lm=1': .* Did you mean 'lam'\?"):
        parse(BASE, "ToyPower.lm=1")
    with pytest.raises(ConfigError, match=r"^flag --gin_param 'DATA=mnist': .* Write 'mnist' for a string"):
        parse(BASE, "DATA=mnist")
    with pytest.raises(ConfigError, match=r"^flag --data: this configuration has no macro DATA"):
        parse("ToyRun.steps = 1", overrides={"DATA": "x"})
    with pytest.raises(ConfigError, match=r"^flag --gin_param '': holds no binding"):
        parse(BASE, "")
    with pytest.raises(ConfigError, match=r"^flag --rate: ToyRun.rate takes float, not 'fast'"):
        parse(BASE, overrides={"ToyRun.rate": "fast"})


def test_missing_file_names_its_neighbour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "ToyRun.steps = 1", "mnist_sba.gin")
    with pytest.raises(ConfigError, match=r"no file 'mnist_sab.gin'. Did you mean 'mnist_sba.gin'\?"):
        config.parse(["mnist_sab.gin"], [], {}, root="ToyRun")


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "run.gin").write_bytes(b"\xef\xbb\xbfToyRun:\r\n  steps = 3\r\n")
    assert config.build(config.parse([str(tmp_path / "run.gin")], [], {}, root="ToyRun")).steps == 3


def test_file_that_is_no_text(tmp_path):
    (tmp_path / "run.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.gin: cannot be read as text"):
        config.parse([str(tmp_path / "run.gin")], [], {}, root="ToyRun")


def test_import_line_registers_a_module_of_ones_own(parse, tmp_path, monkeypatch):
    source = "__all__ = ['ToyOwn', 'Path']\nfrom pathlib import Path\nclass ToyOwn:\n    pass\n"
    write(tmp_path, source, "toy_module.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = parse("import toy_module\nToyRun.steps = 1\nToyRun.factory = @ToyOwn\n", "import toy_module")
    assert type(config.build(cfg).factory()).__name__ == "ToyOwn"
    assert "Path" not in components  # only what the module itself defines
    config.save(cfg, tmp_path / "config.gin")
    assert (tmp_path / "config.gin").read_text().startswith("import toy_module\n")


@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from(" \n\t()[]{}@%/.,:='\"#\\-+01aZ_$é\x00")), max_size=4))
def test_a_damaged_file_never_gives_anything_but_a_clear_error(edits):
    text = BASE
    for position, character in edits:
        text = text[:position] + character + text[position + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        message = ""
        try:
            config.build(config.parse([write(Path(folder), text)], [], {}, root="ToyRun"))
        except ConfigError as error:
            message = str(error)
        assert "\n" not in message


def test_circular_include_shows_the_circle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "include 'b.gin'", "a.gin")
    write(tmp_path, "\ninclude 'a.gin'", "b.gin")
    with pytest.raises(ConfigError, match=r"^b.gin:2: .*circle: a.gin -> b.gin -> a.gin"):
        config.parse(["a.gin"], [], {}, root="ToyRun")


def test_choosing_another_component_leaves_the_old_ones_lines_idle(parse):
    """An ablation is one more line: the file's ToyPower.lam stays without harm, and out of what is saved."""
    cfg = parse(BASE, "main/ToyTerm.weighting = @ToyUniform()")
    assert config.build(cfg).terms[0].weighting == ToyUniform()
    assert not any("ToyPower" in key for key in config.to_dict(cfg))


def test_a_file_may_specialise_what_it_includes(parse):
    cfg = parse(BASE, "teacher/ToyNet.width = 2")  # every ToyNet is now more specific than ToyNet.width = 16
    assert config.build(cfg).teacher.net.width == 2


def test_a_component_that_is_configured_but_never_built_is_an_error(parse):
    cfg = parse("ToyRun.steps = 1\nToyRun.critic = @ToyCritic()\nToyCritic.net = @ToyNet()\nToyNet.width = 5")
    cfg.graph.instances["ghost", "ToyNet"] = cfg.graph.instances["", "ToyNet"]
    with pytest.raises(ConfigError, match=r"@ghost/ToyNet\(\) was configured but never built; unused: ToyNet.width"):
        config.build(cfg)


@pytest.mark.parametrize("value", [1, -2.5, "a'b\"c\\d", None, True, [1, (2,), {"k": []}], float("inf"), (), 1e-12])
def test_literals_are_read_back_exactly(value, parse):
    assert writable(value)
    assert [statement.value for statement, _ in parse_text(f"X = {literal(value)}\n", "here")] == [value]
    import gin.config

    assert gin.config.parse_value(literal(value)) == value


@pytest.mark.parametrize("value", [float("nan"), object(), [ToyNet()], {"a": float("nan")}])
def test_what_gin_cannot_write_is_not_written(value):
    assert not writable(value)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (float, 1, True),
        (float, True, False),
        (int | None, None, True),
        (list[int], (1, 2), False),
        (Sequence[float], (1, 2.5), True),
        (Sequence[str], "abc", False),
        (tuple[int, str], (1, "a"), True),
        (tuple[int, str], (1,), False),
        (dict[str, float], {"a": 1}, True),
        (dict[str, float], {1: 1}, False),
        (Literal[1, "a"], True, False),
        (ToyWeighting, Reference("", "ToyPower"), True),
        (ToySized, Reference("", "ToySource"), True),
        (type[ToyNet], Reference("", "ToyNet", build=False), True),
        (float, Reference("", "toy_halved"), True),
        (str, Reference("", "toy_halved"), False),
    ],
)
def test_accepts(annotation, value, expected):
    assert accepts(annotation, value, components) is expected


def test_two_components_of_one_name_are_refused():
    other = type("ToyNet", (), {})
    with pytest.raises(AssertionError, match="two components named ToyNet"):
        config.register(other)


def test_annotations_of_every_shipped_component_resolve():
    """An annotation imported under TYPE_CHECKING only would switch its parameter's check off."""
    load_components()
    for component in components.values():
        if component.make.__module__.startswith("ratiograph."):
            for name, parameter in component.parameters.items():
                assert parameter.annotation is not __import__("typing").Any, f"{component.name}.{name}"


def test_a_macro_that_names_no_component_is_an_error_where_it_stands():
    with pytest.raises(config.ConfigError, match=r"WEIGHTING=@SBAA.*no component 'SBAA'\. Did you mean 'SBA'"):
        config.parse(["gin/mnist_sba.gin"], ["WEIGHTING=@SBAA()"], {})
