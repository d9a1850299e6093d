"""The graph as data, tree, Mermaid and SVG: counts, settings and edges against the objects they describe."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from PIL import ImageFont

from ratiograph import command_line, config
from ratiograph.config import tree
from ratiograph.reports import canvas, graph_picture, mermaid
from tools_here import call, tool

TWO_TERMS = """
Experiment.task = @Distillation()
Experiment.steps = 30
Experiment.batch_size = 16
Experiment.data = @ShardStream()
ShardStream.urls = 'mnist'
Distillation.student = @OneStep()
OneStep.denoiser = @student/EDM()
OneStep.sigma_init = 1.5
Distillation.teacher = @teacher/EDM()
Distillation.student_score = @student_score/EDM()
Distillation.student_score_times = @LogNormalSigma()
Distillation.student_score_optimizer = @Adam()
Distillation.ratio = @TeacherFeatureRatio()
TeacherFeatureRatio.feature_maps = (0,)
Distillation.ratio_times = @Uniform()
Distillation.ratio_optimizer = @Adam()
Distillation.noising = @VarianceExploding()
Distillation.times = @Uniform()
Distillation.student_optimizer = @Adam()
Distillation.ema = @EMA()
Distillation.objective = @Objective()
EDM.network = @UNet()
UNet.channels = 16
Objective.terms = {'distribution': @distribution/Term(), 'gan': @gan/Term()}
distribution/Term.direction = @ScoreDifference()
distribution/Term.weighting = @MeanNormalized()
MeanNormalized.weighting = @SBA()
SBA.lam = -0.25
gan/Term.direction = @RatioGradient()
gan/Term.weighting = @KL()
gan/Term.coefficient = 0.05
"""


def experiment_of(text, tmp_path, *bindings):
    path = tmp_path / "run.gin"
    path.write_text(text)
    with torch.device("meta"):
        return config.build(config.parse([str(path)], bindings))


@pytest.fixture
def experiment(tmp_path):
    return experiment_of(TWO_TERMS, tmp_path)


@pytest.fixture
def node(experiment):
    return tree.describe(experiment)


def weights(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_settings_and_owners_are_those_of_the_objects(experiment, node):
    task = node.child("task")
    assert task.parameters == weights(experiment.task)
    assert task.child("student").parameters == weights(experiment.task.student.denoiser.network) > 0
    assert task.child("ratio").parameters == weights(experiment.task.ratio)
    assert [n.cls for n in task.child("student").chain()] == ["OneStep", "EDM", "UNet"]
    assert (task.child("student").params, task.child("student").chosen) == ({"sigma_init": 1.5}, {"sigma_init"})
    assert task.child("times").chosen == frozenset()
    terms = task.child("objective").group("terms")
    assert [(name, t.params["coefficient"]) for name, t in terms.items()] == [("distribution", 1.0), ("gan", 0.05)]
    assert terms["distribution"].child("weighting").child("weighting").params == {"lam": -0.25}


def test_requires_names_the_networks_that_run_for_each_part(node):
    terms = node.child("task").child("objective").group("terms")
    assert terms["distribution"].child("direction").requires == ("student_score", "teacher")
    assert terms["distribution"].child("weighting").requires == ("ratio",)  # seen through the normaliser
    assert terms["distribution"].requires == ("ratio", "student_score", "teacher")
    assert terms["gan"].child("weighting").requires == ()  # KL's weight is the same at every ratio
    assert terms["gan"].requires == ("ratio",)
    assert node.child("task").child("ratio").requires == ("teacher",)


def test_internals_are_counted_and_not_drawn(node):
    network = node.child("task").child("teacher").child("network")
    assert network.children == ()
    assert network.parameters > 0


def test_a_shared_object_is_described_once():
    module = torch.nn.Module
    shared = SharedLeaf()
    node = tree.describe(SharedOwner(first=shared, second=[shared]), package=__name__)
    assert [(c.name, c.shared, c.parameters) for c in node.children] == [("first", False, 3), ("second[0]", True, 0)]
    assert issubclass(SharedLeaf, module)


__all__ = ["SharedLeaf", "SharedOwner"]  # what makes a class a component


class SharedLeaf(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))


class SharedOwner:
    def __init__(self, *, first, second):
        self.first, self.second = first, second


def test_tree_shows_every_node_in_order(node, monkeypatch):
    lines = tree.render_tree(node).splitlines()
    task = node.child("task")
    assert lines[0] == "experiment: Experiment  steps=30  batch_size=16"
    assert (
        lines[2]
        == f"│   ├── student: OneStep  sigma_init=1.5  {tree.count(task.child('student').parameters)} parameters"
    )
    assert "│   │   │   │   └── weighting: SBA  lam=-0.25" in lines
    assert lines[-1] == "└── data: ShardStream  urls=mnist"

    def size(node):
        return 1 + sum(map(size, node.children))

    assert len(lines) == size(node)


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12"), (994_561, "995 k"), (1_234_567, "1.23 M"), (2.6e9, "2.6 G"), (999, "999")]
)
def test_counts_in_words(value, text):
    assert tree.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2e-4, "0.0002"),
        ((1, 2.0), "(1, 2)"),
        ("a" * 20 + "/runs/teacher.safetensors", "…aa/runs/teacher.safetensors"),
        (tuple(range(20)), "(0, 1, 2, 3, 4, 5, 6, 7, 8,…"),
    ],
)
def test_short_values(value, text):
    assert tree.short(value, 28) == text


def test_a_ratio_on_the_student_score_is_drawn_with_its_source():
    with torch.device("meta"):
        described = tree.describe(config.build(config.parse(["gin/mnist_dmd2.gin"], [], {})))
    assert "  student_score -->|features| ratio" in mermaid.to_mermaid(described).splitlines()
    assert "  teacher -->|features| ratio" not in mermaid.to_mermaid(described).splitlines()
    assert graph_picture.to_svg(described, title="x").count("features, the same pass") == 1


def test_mermaid_has_the_edges_of_a_step(node):
    lines = [line.strip() for line in mermaid.to_mermaid(node).splitlines()]
    assert lines[0] == "flowchart LR"
    edges = {line for line in lines if re.fullmatch(r"\w+ --> \w+", line)}
    assert edges == {"teacher --> term0", "ratio --> term0", "student_score --> term0", "ratio --> term1"}
    assert "teacher -->|features| ratio" in lines
    assert any("weighting: MeanNormalized of SBA(lam −0.25)" in line for line in lines)
    assert 'field == "x0.backward(field)" ==> x0' in lines


SVG = "{http://www.w3.org/2000/svg}"


def lines_into_terms(svg):
    """Colours of the lines that end at a term's card, from its network."""
    ends = [(p.get("stroke"), re.findall(r"[-\d.]+", p.get("d"))) for p in ET.fromstring(svg).iter(f"{SVG}path")]
    return sorted(colour for colour, d in ends if colour and float(d[-2]) == graph_picture.TERM_X - 2)


def test_svg_draws_the_edges_of_a_step(node):
    border = canvas.BORDER
    expected = [border["teacher"], border["student_score"], border["ratio"], border["ratio"]]
    assert lines_into_terms(graph_picture.to_svg(node)) == sorted(expected)


def test_svg_of_a_step_draws_only_what_exists(tmp_path):
    text = "\n".join(
        line for line in TWO_TERMS.splitlines() if not line.startswith(("Distillation.ratio", "TeacherFeature"))
    )
    text = text.replace("@MeanNormalized()", "@KL()").replace("@RatioGradient()", "@ScoreDifference()")
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("MeanNormalized", "SBA")))
    svg = graph_picture.to_svg(tree.describe(experiment_of(text, tmp_path)))
    assert "ratio estimator" not in svg
    border = canvas.BORDER
    assert lines_into_terms(svg) == sorted([border["teacher"], border["student_score"]] * 2)


def test_a_network_that_no_term_asks_is_marked(tmp_path):
    """KL's weight ignores the ratio: the estimator is trained beside the student, and never sees the field's x_t."""
    text = (
        TWO_TERMS.replace("@SBA()", "@KL()")
        .replace("SBA.lam = -0.25", "")
        .replace("@RatioGradient", "@ScoreDifference")
    )
    svg = graph_picture.to_svg(tree.describe(experiment_of(text, tmp_path)))
    assert svg.count("no term uses it") == 1
    paths = [re.findall(r"[-\d.]+", p.get("d")) for p in ET.fromstring(svg).iter(f"{SVG}path")]
    entering = [d for d in paths if len(d) == 8 and float(d[-2]) == graph_picture.NETWORK_X - 2]
    assert len(entering) == 2  # teacher and student score, not the ratio
    assert "no term uses it" not in graph_picture.to_svg(tree.describe(experiment_of(TWO_TERMS, tmp_path)))


def overlaps(a, b):
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


@pytest.mark.parametrize("name", ["step", "tree", "mnist_teacher"])
def test_pictures_are_self_contained_and_nothing_overlaps_or_runs_out(name, node):
    if name == "mnist_teacher":
        with torch.device("meta"):
            node = tree.describe(config.build(config.parse(["gin/mnist_teacher.gin"])))
    svg = (
        graph_picture.draw_tree(node, "a tree") if name == "tree" else graph_picture.to_svg(node, 'a <title> & "more"')
    )
    root = ET.fromstring(svg)
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    assert root.find(f"{SVG}title").text == ("a tree" if name == "tree" else 'a <title> & "more"')
    width, height = float(root.get("width")), float(root.get("height"))
    cards = [
        [float(r.get(k)) for k in ("x", "y", "width", "height")] for r in root.iter(f"{SVG}rect") if r.get("rx") == "9"
    ]
    assert len(cards) >= 8
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in cards)
    assert not any(overlaps(a, b) for i, a in enumerate(cards) for b in cards[:i])
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.get("x")) <= width
        assert 0 < float(text.get("y")) <= height


@pytest.mark.parametrize(
    "text",
    ["TeacherFeatureRatio ∘ UNet", "MeanNormalized", "feature_maps (0, 1, 2) · width 64", "995 k parameters", "WWWW"],
)
@pytest.mark.parametrize("size", [11, 14.5])
def test_width_estimate_is_an_upper_bound_and_not_wasteful(text, size):
    measured = ImageFont.load_default(100).getlength(text) * size / 100  # a Helvetica-like face
    assert measured <= canvas.width_of(text, size) <= 1.45 * measured


def test_fit_keeps_what_fits_and_cuts_what_does_not():
    assert canvas.fit("short", 12, 100) == "short"
    cut = canvas.fit("a rather long piece of text", 12, 100)
    assert cut.endswith("…")
    assert canvas.width_of(cut, 12) <= 100


def test_tool_writes_what_the_suffix_asks(tmp_path, capsys):
    (tmp_path / "run.gin").write_text(TWO_TERMS)

    def draw(name, *flags):
        flags = (f"--gin_file={tmp_path / 'run.gin'}", f"--out={tmp_path / name}", *flags)
        with tool("draw_graph") as module:
            return call(module, *flags, code_of=command_line.configuration_code)

    assert draw("g.svg") == 0
    assert ET.parse(tmp_path / "g.svg").getroot().find(f"{SVG}title").text == "run"
    assert draw("g.mmd", "--gin_param=SBA.lam=2.0") == 0
    assert "SBA(lam 2)" in (tmp_path / "g.mmd").read_text()
    assert draw("g.png") == 1
    assert "ends in .svg or .mmd" in capsys.readouterr().err
    assert draw("no.svg", "--gin_param=SBA.lm=2.0") == 2
    assert "Did you mean 'lam'?" in capsys.readouterr().err
    assert not (tmp_path / "no.svg").exists()
