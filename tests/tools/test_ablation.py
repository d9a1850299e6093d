"""Grids of runs: their cells, the order they run in, what the table and the figure say, and a cluster's arrays."""

import csv
import json
import os
import shlex
import signal
import stat
import statistics
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import marked_text
from ablations import execution, grids, plots, tables
from ablations.grids import Grid, Row
from paper_figures.drawing import spread
from ratiograph import config

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "ablate.py"
ARRAY = ROOT / "launch" / "slurm" / "array_ablation.sbatch"
METRICS = {"distance": {"label": "distance to p", "better": "lower"}, "share": {"label": "share", "better": "higher"}}


def row(name, *bindings, needs=(), **more):
    return Row(name=name, gin_files=("run.gin",), bindings=bindings, needs=tuple(needs), **more)


def grid(*rows, **more):
    return Grid(name="test", rows=rows, **more)


def leave(folder, *, distance, share=0.5, before=20.0, seconds=10.0, curve=()):
    """Writes what a finished run leaves."""
    folder.mkdir(parents=True)
    rows = [
        {"name": "teacher", "evaluations": 35, "distance": 1.25, "share": 0.25},
        {"name": "before training", "evaluations": 1, "distance": before},
        {"name": "student", "evaluations": 1, "distance": distance, "share": share, "highlight": True},
    ]
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows, "metrics": METRICS}))
    log = [{"step": s, "seconds": seconds * s / 4, "images": 8 * s, "evaluation/distance": y} for s, y in curve]
    log = log or [{"step": 4, "seconds": seconds}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))


# --- grids and cells ----------------------------------------------------------------------------------------


def write_grid(tmp_path, text):
    path = tmp_path / "some.toml"
    path.write_text(textwrap.dedent(text))
    return path


def test_a_grid_file_gives_rows_axes_and_columns(tmp_path):
    path = write_grid(
        tmp_path,
        """
        title = "Some"
        gin_file = "a.gin"
        bindings = ["A.x = 1"]
        steps = 7
        columns = ["distance", "seconds"]
        curve = "evaluation/distance"
        [axes]
        "SBA.lam" = [-1, 0.5]
        WEIGHTING = ["@KL()", "@LS()"]
        [[rows]]
        name = "first"
        [[rows]]
        name = "second"
        gin_file = ["b.gin", "c.gin"]
        bindings = ["A.y = '{runs}/first/student.safetensors'"]
        needs = ["first"]
        steps = 3
        published = {FID = 2.13}
        """,
    )
    read = grids.read_grid(path)
    assert read == Grid(
        name="some",
        source=str(path),
        title="Some",
        rows=(
            Row(name="first", gin_files=("a.gin",), bindings=("A.x = 1",), steps=7),
            Row(
                name="second",
                gin_files=("b.gin", "c.gin"),
                bindings=("A.x = 1", "A.y = '{runs}/first/student.safetensors'"),
                needs=("first",),
                steps=3,
                published={"FID": 2.13},
            ),
        ),
        axes={"SBA.lam": ("-1", "0.5"), "WEIGHTING": ("@KL()", "@LS()")},
        columns=("distance", "seconds"),
        curve="evaluation/distance",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gin_file = 'a.gin'", "neither"),
        ("gin_file = 'a.gin'\ncolumn = ['x']\n[[rows]]\nname = 'a'", "'column'. Did you mean 'columns'"),
        ("[[rows]]\nname = 'a'", "row 'a' has no gin file"),
        ("gin_file = 'a.gin'\n[[rows]]\nbindings = []", "row 1 has no name"),
        ("gin_file = 'a.gin'\n[[rows]]\nname = 'a'\nbinding = []", "row 'a' has the unknown key 'binding'"),
        ("gin_file = 'a.gin'\n[[rows]]\nname = 'a'\nbindings = 'x = 1'", "row 'a': the value of 'bindings' is a str"),
        ("gin_file = 'a.gin'\n[[rows]]\nname = 'a'\nbindings = [1]", "row 'a': 'bindings' is a list of strings"),
        ("gin_file = 'a.gin'\n[[rows]]\nname = 'a'\n[[rows]]\nname = 'a'", "two rows are named 'a'"),
        (
            "gin_file = 'a.gin'\n[[rows]]\nname = 'ab'\nneeds = ['aab']",
            "needs 'aab', which is no row. Did you mean 'ab'",
        ),
        ("gin_file = 'a.gin'\n[axes]\nSBA.lam = [1]", "its key in quotes"),
        ("gin_file = ", "is no TOML"),
        ("a = " + "[" * 5_000, "is no TOML"),
        ("gin_file = 'a.gin'\n[axes]\n" + "\n".join(f"'A.x{k}' = {[*range(60)]}" for k in range(9)), "runs a seed"),
        ("gin_file = 'a.gin'\n[[rows]]\nname = 'a'\npublished = {fid = 'x'}", "a published value is no number"),
    ],
)
def test_a_mistake_in_a_grid_is_said_with_its_file(tmp_path, text, message):
    path = write_grid(tmp_path, text)
    with pytest.raises(ValueError, match=r"some\.toml") as caught:
        grids.read_grid(path)
    assert message in str(caught.value)


def test_rows_that_need_each_other_are_refused():
    with pytest.raises(ValueError, match="'b', 'c' need each other"):
        grid(row("a"), row("b", needs=["c"]), row("c", needs=["b", "a"]))


def test_an_axis_is_split_at_its_own_commas_only():
    text = "Objective.terms = {'a': @Term(), 'b,c': @x/Term()}, {'a': @Term()}, (1, [2, 3]), 'it, too'"
    name, values = grids.parse_axis(text)
    assert name == "Objective.terms"
    assert values == ("{'a': @Term(), 'b,c': @x/Term()}", "{'a': @Term()}", "(1, [2, 3])", "'it, too'")
    for wrong in ("SBA.lam", "SBA.lam = 1,,2", "= 1", "SBA.lam ="):
        with pytest.raises(ValueError, match="write BINDING = value"):
            grids.parse_axis(wrong)


def test_slugs_are_readable_and_stable():
    assert grids.slug("SBA, λ = 0.5, no GAN") == "SBA_λ=0.5_no_GAN"
    assert grids.slug("WEIGHTING = @KL(), gan/Term.coefficient = -1e-3") == "WEIGHTING=KL_gan_Term.coefficient=-1e-3"
    assert grids.slug("../x") == "x"
    long = [grids.slug("a" * 300 + end) for end in "xy"]
    assert [len(name) for name in long] == [100, 100]
    assert long[0] != long[1]
    with pytest.raises(ValueError, match="no letter or digit"):
        grids.slug("..")


def test_rows_of_one_folder_are_refused():
    with pytest.raises(ValueError, match="'a, b' and 'A_B' would share the folder"):
        grids.cells_of(grid(row("a, b"), row("A_B")), "runs")


def test_cells_are_rows_times_settings_times_seeds():
    made = grid(row("one"), row("two", "W = '{runs}/one/x'", needs=["one"], steps=9), axes={"A.x": ("1", "2")})
    cells = grids.cells_of(made, "runs/g", seeds=[0, 5], bindings=["B = {'{': 1}"])
    assert [cell.index for cell in cells] == list(range(8))
    assert [str(cell.folder) for cell in cells] == [
        f"runs/g/seed_{seed}/A.x={x}/{name}" for seed in (0, 5) for name in ("one", "two") for x in (1, 2)
    ]
    assert cells[7].name == "two, A.x = 2, seed 5"
    above = "runs/g/seed_5/A.x=2"
    steps_and_seed = ("Experiment.steps = 9", "Experiment.seed = 5")
    assert cells[7].bindings == (f"W = '{above}/one/x'", "A.x = 2", *steps_and_seed, "B = {'{': 1}")
    assert cells[7].needs == (Path(above) / "one",)
    assert grids.cells_of(made, "g", steps=2)[3].bindings[-1] == "Experiment.steps = 2"
    alone = grids.cells_of(grid(row(""), axes={"A.x": ("1",), "B": ("@C()",)}), "g")
    assert [str(cell.folder) for cell in alone] == ["g/A.x=1_B=C"]


def test_only_brings_what_it_needs():
    cells = grids.cells_of(grid(row("a"), row("b"), row("c", needs=["a"]), row("d", needs=["c"])), "g")
    assert [cell.row.name for cell in grids.with_needs([cells[3]], cells)] == ["a", "c", "d"]


@pytest.mark.parametrize("path", sorted((ROOT / "gin" / "ablations").glob("*.toml")), ids=lambda path: path.stem)
def test_every_row_of_a_shipped_grid_can_be_built(path):
    cells = grids.cells_of(grids.read_grid(path), "runs")
    configurations = [config.to_dict(execution.check(cell)) for cell in cells]
    assert len({str(sorted(c.items(), key=str)) for c in configurations}) == len(cells) > 1, "two rows are the same run"


PIPE = "'pipe:touch trace; cat y.tar'"
HOSTILE = {
    'bindings = ["import evilmod"]\n[[rows]]\nname = "a"': "import evilmod",
    '[[rows]]\nname = "a"\nbindings = ["import evilmod"]': "import evilmod",
    f'bindings = ["DATA = {PIPE}"]\n[[rows]]\nname = "a"': f"DATA = {PIPE}",
    f'[[rows]]\nname = "a"\nbindings = ["ShardStream.urls = {PIPE}"]': f"ShardStream.urls = {PIPE}",
    f'[[rows]]\nname = "a"\n[axes]\nDATA = ["{PIPE}"]': f"DATA = {PIPE}",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_grid_s_file_runs_nothing_that_the_command_line_does_not_name(text, tmp_path, monkeypatch):
    named = HOSTILE[text]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("evilmod.py").write_text("open('trace', 'w')\n__all__ = []\n")
    read = grids.read_grid(write_grid(tmp_path, f'gin_file = "gin/mnist_sba.gin"\n{text}'))
    (cell,) = grids.cells_of(read, "runs", bindings=["SBA.lam = 1.0"])
    with pytest.raises(
        ValueError, match=r"^row 'a.*some\.toml, .*the file asks to run (code, import evil|a command, 'p)"
    ):
        execution.check(cell)
    assert not Path("trace").exists()
    (cell,) = grids.cells_of(read, "runs", bindings=[named])
    execution.check(cell)
    assert Path("trace").exists() == (named == "import evilmod")  # a check reads no data
    sys.modules.pop("evilmod", None)


def test_ablate_refuses_a_hostile_grid_before_it_starts_anything(tmp_path):
    (tmp_path / "evilmod.py").write_text("open('trace', 'w')\n__all__ = []\n")
    (tmp_path / "evil.toml").write_text(
        "gin_file = 'gin/mnist_sba.gin'\ntitle = '$(touch trace)'\n[[rows]]\nname = '$(touch trace)'\n"
        "bindings = ['import evilmod']\npublished = {'$(touch trace)' = 1}\n"
    )
    for more in ("--dry_run", "--task=0", "--slurm_dry_run", "--steps=1"):
        code, output, errors = tool("--grid=evil.toml", more, cwd=tmp_path, PYTHONPATH=f"{ROOT / 'lib'}:{tmp_path}")
        assert (code, output) == (1, "")
        assert errors == (
            "error: row '$(touch trace)': evil.toml, 'import evilmod': the file asks to run code, import evilmod. "
            "If you know and trust that module, name it: --gin_param='import evilmod'.\n"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.toml", "evilmod.py"]


def test_control_characters_of_a_grid_do_not_reach_the_terminal(tmp_path):
    path = write_grid(tmp_path, 'gin_file = "a.gin"\n[[rows]]\nname = "a\\u001b[2J"')
    with pytest.raises(ValueError, match=r"row 'a\\\\x1b\[2J': its name, files or bindings hold control characters"):
        grids.cells_of(grids.read_grid(path), "runs")


# --- running ------------------------------------------------------------------------------------------------

STAND_IN = """
import json, pathlib, signal, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
lines = [a.split("=", 1)[1] for a in sys.argv if a.startswith("--gin_param=")]
folder = pathlib.Path(flags["workdir"])
with open(folder.parent / "order.txt", "a") as file:
    print("start", folder.name, flags["device"], file=file)
while "MEET" in lines and (folder.parent / "order.txt").read_text().count("start") < 2:
    time.sleep(0.02)
if "WAIT" in lines:
    def leave(*_):
        (folder / "stopped").touch()
        sys.exit(3)
    signal.signal(signal.SIGTERM, leave)
    (folder / "waiting").touch()
    time.sleep(60)
if "FAIL" in lines:
    print("Traceback ...", flush=True)
    sys.exit("error: no luck\\nmore words")
with open(folder.parent / "order.txt", "a") as file:
    print("end", folder.name, flags["device"], file=file)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A launch/main.py that only notes that it ran."""
    path = tmp_path / "main.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(execution, "MAIN", path)
    monkeypatch.setattr(execution, "POLL", 0.02)


def run(cells, done=(), **more):
    given = {"processes": 2, "threads": 1, "devices": ["cpu"], "report": lambda ended: None, **more}
    return execution.run_cells(cells, done, **given)


def test_cells_wait_for_what_they_need_and_a_failure_ends_only_those(tmp_path, stand_in):
    rows = [row("last", needs=["middle"]), row("middle", needs=["first"]), row("first"), row("bad", "FAIL")]
    rows += [row("starved", needs=["bad"]), row("hungry", needs=["starved", "first"]), row("done")]
    cells = grids.cells_of(grid(*rows, row("after", needs=["done"])), tmp_path / "runs")
    reported = []
    ended = run([c for c in cells if c.row.name != "done"], [tmp_path / "runs" / "done"], report=reported.append)
    order = [line.split()[:2] for line in (tmp_path / "runs/order.txt").read_text().splitlines()]
    place = {tuple(words): k for k, words in enumerate(order)}
    assert place["end", "first"] < place["start", "middle"]
    assert place["end", "middle"] < place["start", "last"]
    assert {name for _, name in place} == {"first", "middle", "last", "bad", "after"}
    errors = {end.cell.row.name: end.error for end in ended if end.error}
    assert errors.pop("bad") == "error: no luck"
    assert errors.pop("starved") == f"it needs {tmp_path / 'runs/bad'}, which failed"
    assert errors.pop("hungry") == f"it needs {tmp_path / 'runs/starved'}, which failed"
    assert not errors
    assert reported == ended
    assert "Traceback ..." in (tmp_path / "runs/bad/log.txt").read_text()


def test_processes_bound_what_runs_together_and_devices_take_turns(tmp_path, stand_in):
    rows = [row(f"r{k}", "MEET") for k in range(6)]  # the first two end only once both have started
    run(grids.cells_of(grid(*rows), tmp_path), devices=["cpu", "cuda:1"], processes=2)
    words = [line.split() for line in (tmp_path / "order.txt").read_text().splitlines()]
    together = np.cumsum([1 if event == "start" else -1 for event, *_ in words])
    assert together.max() == 2
    assert together[-1] == 0
    running = {}
    for event, name, device in words:
        if event == "start":
            assert device not in running.values(), "two runs on one device"
            running[name] = device
        else:
            del running[name]


def test_a_command_is_written_as_one_would_type_it():
    words = ["python", "a b.py", "--x=1", "--on", "--p=W = @KL()", "--p=T = {'a': @B()}", "--p=$'x'", "--e="]
    written = execution.spell_command(words)
    assert shlex.split(written) == words
    assert written.startswith("""python 'a b.py' --x=1 --on --p='W = @KL()' --p="T = {'a': @B()}" --p=""")


@pytest.fixture
def interruptible():
    """Ctrl-C raises here even where the tests run in a shell's background, whose jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_stops_the_runs_first(tmp_path, stand_in):
    cells = grids.cells_of(grid(row("a", "WAIT"), row("b", "WAIT"), row("c")), tmp_path)

    def interrupt():
        while not all((tmp_path / name / "waiting").exists() for name in "ab"):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(cells)
    thread.join()
    assert all((tmp_path / name / "stopped").exists() for name in "ab")
    assert not (tmp_path / "c").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# --- the table ----------------------------------------------------------------------------------------------


def table_of(tmp_path, made, results, seeds=()):
    """The table of a grid whose cells left ``results``, keywords of ``leave`` or None, in order."""
    cells = grids.cells_of(made, tmp_path / "runs", seeds=seeds)
    for cell, result in zip(cells, results, strict=True):
        if result is not None:
            leave(cell.folder, **result)
    return tables.tabulate(made, cells)


def test_the_table_holds_the_highlighted_rows_with_the_best_in_bold(tmp_path):
    rows = [row("a", published={"distance": 2.5}), row("b"), row("c"), row("d", published={"FID": 3.0})]
    made = grid(*rows, title="Some runs", columns=("distance", "share", "seconds", "steps"))
    results = [{"distance": 3.456}, {"distance": 12.0, "share": 0.75, "before": 22.0, "seconds": 1234.5}, None]
    table = table_of(tmp_path, made, [*results, {"distance": 3.4561}])
    assert table.markdown("some command").splitlines() == [
        "Some runs. Made by `some command`. 1 of 4 runs are missing.",
        "",
        "| configuration | distance to p ↓ | share ↑ | training, s | steps | distance to p, published (other data) "
        "| FID, published (other data) |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| *teacher* | 1.25 | 0.250 |  |  |  |  |",
        "| *before training* | 20.00 to 22.00 |  |  |  |  |  |",
        "| a | **3.46** | 0.500 | 10 | 4 | 2.5 |  |",
        "| b | 12.00 | **0.750** | 1,234 | 4 |  |  |",
        "| c | – | – | – | – |  |  |",
        "| d | **3.46** | 0.500 | 10 | 4 |  | 3 |",
    ]
    found = list(csv.DictReader(table.csv().splitlines()))
    assert [line["distance"] for line in found] == ["3.456", "12.0", "", "3.4561"]
    assert [Path(line["folder"]).name for line in found] == list("abcd")


def test_rows_to_start_from_are_left_out_and_truths_are_shares(tmp_path):
    made = grid(row("stage 1"), row("yes"), row("no"), columns=("collapsed",))
    cells = grids.cells_of(made, tmp_path)
    cells[0].folder.mkdir(parents=True)
    (cells[0].folder / "teacher.safetensors").touch()
    for cell, collapsed in zip(cells[1:], (True, False), strict=True):
        leave(cell.folder, distance=1.0)
        document = json.loads((cell.folder / "evaluation.json").read_text())
        document["rows"][-1]["collapsed"] = collapsed
        (cell.folder / "evaluation.json").write_text(json.dumps(document))
    lines = tables.tabulate(made, cells).markdown("x").splitlines()
    assert lines[-2:] == ["| yes | 1.00 |", "| no | 0.00 |"]
    assert not any("stage 1" in line for line in lines)


def test_seeds_give_mean_and_sample_deviation(tmp_path):
    distances = [[3.0, 1.0], [4.0, 2.0], [5.0, None]]  # by seed, then row
    results = [None if d is None else {"distance": d} for by_row in distances for d in by_row]
    made = grid(row("a"), row("b"), columns=("distance",))
    table = table_of(tmp_path, made, results, seeds=(0, 1, 2))
    written = table.document("command")
    assert [line["values"]["distance"]["values"] for line in written["rows"]] == [[3.0, 4.0, 5.0], [1.0, 2.0]]
    for line, values in zip(written["rows"], ([3.0, 4.0, 5.0], [1.0, 2.0]), strict=True):
        assert line["values"]["distance"]["mean"] == pytest.approx(np.mean(values))
        assert line["values"]["distance"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert table.markdown("command").splitlines()[-2:] == ["| a | 4.00 ± 1.00 (3) |", "| b | **1.50** ± 0.71 (2) |"]


def test_axes_have_columns_of_their_own(tmp_path):
    made = grid(row(""), axes={"SBA.lam": ("0.5", "1"), "WEIGHTING": ("@KL()", "@LS()")})
    lines = table_of(tmp_path, made, [{"distance": d} for d in (1, 2, 3, 4)]).markdown("x").splitlines()
    assert lines[2].startswith("| `SBA.lam` | `WEIGHTING` | distance to p ↓ | share ↑ | training, s |")
    assert lines[-1].startswith("| 1 | @LS() | 4.00 | ")


def test_a_value_that_is_not_finite_is_never_best(tmp_path):
    made = grid(row("a"), row("b"), row("c"), columns=("distance",))
    table = table_of(tmp_path, made, [{"distance": float("-inf")}, {"distance": 2.0}, {"distance": 3.0}])
    assert table.markdown("x").splitlines()[-3:] == ["| a | not finite |", "| b | **2.00** |", "| c | 3.00 |"]


def test_a_run_without_an_evaluator_shows_time_and_steps(tmp_path):
    made = grid(row("stage 1"), row("stage 2"), columns=("distance", "seconds", "steps"))
    cells = grids.cells_of(made, tmp_path)
    leave(cells[0].folder, distance=0, seconds=33.0)
    (cells[0].folder / "evaluation.json").unlink()
    leave(cells[1].folder, distance=2.0)
    assert tables.read_result(cells[0].folder) is None
    (cells[0].folder / "teacher.safetensors").touch()
    lines = tables.tabulate(made, cells).markdown("x").splitlines()
    assert lines[-2:] == ["| stage 1 | – | 33 | 4 |", "| stage 2 | 2.00 | 10 | 4 |"]


def test_an_unknown_column_is_an_error_that_lists_the_others(tmp_path):
    with pytest.raises(ValueError, match=r"'distanse': choose from .*distance, share"):
        table_of(tmp_path, grid(row("a"), columns=("distanse",)), [{"distance": 1.0}])


def test_the_text_between_the_markers_is_replaced(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("a\n<!-- ablation g -->\nold\n<!-- /ablation g -->\nb\n<!-- ablation h -->\n<!-- /ablation h -->\n")
    new = marked_text.replaced(path, "ablation g", "new\ntable")
    assert new == path.read_text().replace("old", "new\ntable")
    with pytest.raises(ValueError, match="<!-- ablation i -->"):
        marked_text.replaced(path, "ablation i", "")


# --- the figure ---------------------------------------------------------------------------------------------


def lines_of(figure):
    """Points of every named line of a figure, by name."""
    FigureCanvasAgg(figure).draw()
    named = {line.get_label(): line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")}
    return {name: line.get_xydata().tolist() for name, line in named.items()}


def test_dots_are_the_first_column_in_the_order_of_the_rows(tmp_path):
    made = grid(row("a"), row("b"), row("c"), columns=("distance",))
    table = table_of(tmp_path, made, [{"distance": 3.0}, None, {"distance": 2.0}])
    figure = plots.draw(table)
    assert lines_of(figure) == {"a": [[3.0, 0.0]], "c": [[2.0, 2.0]]}
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.get_ylim() == (2.5, -0.5)  # the first row on top
    assert axes.get_xlabel() == "distance to p, lower is better"
    best = {line.get_label(): line.get_color() == plots.ACCENT for line in axes.get_lines()}
    assert (best["a"], best["c"]) == (False, True)
    assert plots.draw(table_of(tmp_path / "none", made, [None] * 3)) is None


def test_a_numeric_axis_is_the_abscissa(tmp_path):
    axes = {"SBA.lam": ("3", "-1", "0.5"), "gan/Term.coefficient": ("0", "80")}
    made = grid(row(""), axes=axes, columns=("distance",))
    results = [{"distance": 10 * lam + gan + seed} for seed in (0, 1) for lam in (3, 2, 4) for gan in (0, 1)]
    figure = plots.draw(table_of(tmp_path, made, results, seeds=(0, 1)))
    assert lines_of(figure) == {
        "coefficient 0": [[-1, 20.5], [0.5, 40.5], [3, 30.5]],
        "coefficient 80": [[-1, 21.5], [0.5, 41.5], [3, 31.5]],
    }
    assert figure.axes[0].get_xlabel() == "SBA.lam"


def test_curves_are_means_over_seeds_where_all_were_measured(tmp_path):
    curves = [[(0, 9.0), (2, 4.0), (4, 2.0)], [(0, 8.0), (4, 3.0)], [(0, 7.0), (2, 6.0)], None]
    results = [{"distance": 1.0, "curve": c} if c else None for c in curves]
    made = grid(row("a"), row("b"), curve="evaluation/distance")
    table = table_of(tmp_path, made, results, seeds=(0, 1))
    figure = plots.draw(table)
    assert lines_of(figure) == {"a": [[0, 8.0], [16, 5.0]], "b": [[0, 8.0], [32, 3.0]]}
    faint = [line.get_xydata().tolist() for line in figure.axes[0].get_lines() if line.get_alpha() == 0.3]
    assert faint == [[[0, 9.0], [16, 4.0], [32, 2.0]], [[0, 7.0], [16, 6.0]]]
    named = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(named) == ["a", "b", "teacher"]  # "before training" is at 20, far above every run
    assert figure.axes[0].get_xlabel() == "samples seen"
    wrong = tables.Table(grid(*made.rows, curve="evaluation/distanse"), table.lines, table.columns)
    with pytest.raises(ValueError, match=r"'evaluation/distanse': choose from evaluation/distance"):
        plots.draw(wrong)


def test_both_files_of_the_figure_are_written(tmp_path):
    table = table_of(tmp_path, grid(row("a"), columns=("distance",)), [{"distance": 3.0}])
    png, svg = plots.save(plots.draw(table), tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    first = svg.read_bytes()
    plots.save(plots.draw(table), tmp_path)
    assert svg.read_bytes() == first


def test_names_beside_lines_keep_their_order_and_distance():
    random = np.random.default_rng(0)
    for count in (1, 2, 7, 15):
        heights = np.sort(random.uniform(size=count) ** 3)
        placed = np.array(spread(heights.tolist(), 0.05))
        assert (np.diff(placed) > 0.05 - 1e-9).all()
        assert placed.min() > -1e-9
        assert placed.max() < 1 + 1e-9
    assert spread([0.2, 0.5, 0.9], 0.05) == [0.2, 0.5, 0.9]
    assert spread([0.4, 0.42, 0.9], 0.1) == pytest.approx([0.36, 0.46, 0.9])


# --- a cluster ----------------------------------------------------------------------------------------------


def test_arrays_wait_for_the_tasks_that_their_cells_need():
    rows = [
        row("s2a", needs=["s1a"]),
        row("s1a"),
        row("s1b"),
        row("s2b", needs=["s1b", "s1a"]),
        row("s2c", needs=["s1a"]),
    ]
    rows += [row("s3", needs=["s2b", "old"]), row("old"), row("alone")]
    cells = grids.cells_of(grid(*rows), "g")
    todo = [cell for cell in cells if cell.row.name != "old"]
    sent = []

    def send(line):
        sent.append(line)
        return f"{100 + len(sent)};cluster\n"

    jobs = execution.submit(
        todo, ["--grid=x"], send, script=Path("a.sbatch"), exports={"PYTHON": "p"}, options=["--qos=q"], at_a_time=3
    )
    common = ["--export=ALL,PYTHON=p", "--qos=q", "a.sbatch", "--grid=x"]
    kill = "--kill-on-invalid-dep=yes"
    assert sent == [
        ["sbatch", "--parsable", "--array=1-2,7%3", *common],
        ["sbatch", "--parsable", "--array=0,4%3", "--dependency=afterok:101_1", kill, *common],
        ["sbatch", "--parsable", "--array=3%3", "--dependency=afterok:101_1:101_2", kill, *common],
        ["sbatch", "--parsable", "--array=5%3", "--dependency=afterok:103_3", kill, *common],
    ]
    assert {job: [cell.index for cell in group] for job, group in jobs.items()} == {
        "101": [1, 2, 7],
        "102": [0, 4],
        "103": [3],
        "104": [5],
    }


# --- the tool, end to end -----------------------------------------------------------------------------------

TINY = """
gin_file = "gin/mixture2d_scores.gin"
bindings = ["MixtureEvaluator.samples = 40", "MixtureEvaluator.repeats = 2", "MLP.width = 16"]
steps = 3
columns = ["energy_distance", "stray", "seconds", "steps"]
[axes]
WEIGHTING = ["@KL()", "@LS()"]
"student/Adam.lr" = [1e-3, 0.5]
"""


def tool(*flags, cwd, script=(sys.executable, TOOL), **environment):
    """Runs tools/ablate.py; (exit code, stdout, stderr)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    done = subprocess.run([*map(str, script), *flags], cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """A 2x2 grid on the exact world, really run: the last cell as task 3 of an array, the others here."""
    folder = tmp_path_factory.mktemp("ablated")
    (folder / "tiny.toml").write_text(TINY)
    (folder / "RESULTS.md").write_text("head\n<!-- ablation tiny -->\n<!-- /ablation tiny -->\ntail\n")
    flags = ["--grid=tiny.toml", "--folder=runs", "--batch_size=16"]
    variables = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_SUBMIT_DIR": str(folder), "PYTHON": sys.executable}
    task = tool(*flags, cwd=folder, script=("bash", ARRAY), ABLATE=str(TOOL), **variables)
    after_task = sorted(path.parent.name for path in folder.glob("runs/*/evaluation.json"))
    whole = tool(*flags, "--out=RESULTS.md", cwd=folder)
    return folder, flags, task, after_task, whole


NAMES = [f"WEIGHTING={w}_student_Adam.lr={lr}" for w in ("KL", "LS") for lr in ("0.001", "0.5")]


def test_a_task_of_an_array_runs_its_cell_alone(ablated):
    folder, _, (code, output, errors), after_task, _ = ablated
    assert code == 0, errors
    assert after_task == [NAMES[3]]
    assert output == f"WEIGHTING = @LS(), student/Adam.lr = 0.5: its output is in runs/{NAMES[3]}/log.txt\n"
    log = (folder / "runs" / NAMES[3] / "log.txt").read_text()
    assert "step 3/3" in log
    assert log.count("$ ") == 1


def test_a_dry_run_lists_what_only_asks_for_by_its_number_in_the_grid(ablated):
    folder, flags, *_ = ablated
    code, output, errors = tool(*flags, "--only=@LS()", "--dry_run", cwd=folder)
    assert code == 0, errors
    assert [line.split()[0] for line in output.splitlines() if "main.py" not in line] == ["2", "3"]


def test_a_grid_is_run_and_tabulated(ablated):
    folder, _, _, _, (code, output, errors) = ablated
    assert code == 0, errors
    assert "3 runs to do, 1 done, 2 at a time" in output
    assert "[3/3]" in output
    document = json.loads((folder / "runs/table.json").read_text())
    assert [line["setting"] for line in document["rows"]] == [
        {"WEIGHTING": w, "student/Adam.lr": lr} for w in ("@KL()", "@LS()") for lr in ("0.001", "0.5")
    ]
    distances = []
    for line, name in zip(document["rows"], NAMES, strict=True):
        measured = json.loads((folder / "runs" / name / "evaluation.json").read_text())["rows"][-1]
        distances.append(measured["energy_distance"])
        for key in ("energy_distance", "stray"):
            assert line["values"][key] == {"mean": measured[key], "std": None, "values": [measured[key]]}
        assert line["values"]["steps"]["mean"] == 3
        config = (folder / "runs" / name / "config.gin").read_text()
        weighting, lr = (line["setting"][key] for key in ("WEIGHTING", "student/Adam.lr"))
        assert f"WEIGHTING = {weighting}\n" in config
        assert f"student/Adam.lr = {lr}\n" in config
        assert "Experiment.batch_size = 16\n" in config
    assert statistics.stdev(distances) > 0.01  # a rate of 0.5 is felt in three steps
    text = (folder / "RESULTS.md").read_text()
    table = (folder / "runs/table.md").read_text()
    assert text == f"head\n<!-- ablation tiny -->\n{table}<!-- /ablation tiny -->\ntail\n"
    made = "python tools/ablate.py --grid=tiny.toml --folder=runs --batch_size=16 --out=RESULTS.md"
    assert table.startswith(f"Made by `{made}`.\n")
    assert (folder / "runs/figure.png").stat().st_size > 5000


def test_a_second_invocation_runs_nothing(ablated):
    folder, flags, *_ = ablated
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")}
    code, output, errors = tool(*flags, cwd=folder)
    assert code == 0, errors
    assert "0 runs to do, 4 done" in output
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")} == before


def test_a_run_is_finished_at_its_last_step_and_of_its_own_configuration_only(ablated):
    folder, *_ = ablated
    made = grids.read_grid(folder / "tiny.toml")

    def finished(*lines, **more):
        cell = grids.cells_of(made, folder / "runs", bindings=["Experiment.batch_size = 16", *lines], **more)[2]
        return execution.is_finished(cell, execution.check(cell))

    assert finished()
    assert not finished(steps=4)  # launch/main.py goes on from step 3
    with pytest.raises(ValueError, match="holds 3 steps, and 2 are asked for"):
        finished(steps=2)
    with pytest.raises(ValueError, match=r"row 'WEIGHTING = @LS\(\), .*MLP.width is 16 there and 8 here"):
        finished("MLP.width = 8")


def test_one_typo_is_said_before_anything_runs(tmp_path):
    rows = [f"[[rows]]\nname = 'row {k}'\nbindings = ['SBA.lam = {k}.0']\n" for k in range(3)]
    rows[2] = rows[2].replace("SBA.lam", "SBA.lamda")
    (tmp_path / "typo.toml").write_text("gin_file = 'gin/mnist_sba.gin'\n" + "".join(rows))
    code, output, errors = tool("--grid=typo.toml", "--folder=runs", cwd=tmp_path)
    assert code == 1
    assert output == ""
    assert errors.startswith("error: row 'row 2': typo.toml, 'SBA.lamda = 2.0': SBA has no parameter 'lamda'")
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_slurm_submits_what_is_left_by_way_of_sbatch(ablated, tmp_path):
    folder, flags, *_ = ablated
    fake = tmp_path / "sbatch"
    fake.write_text(f'#!/bin/bash\nprintf "%q " "$@" >>{tmp_path}/calls; echo >>{tmp_path}/calls; echo 77\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    more = ["--slurm", "--sbatch=--partition=gpu", "--processes=2", "--steps=4", "--only=KL"]
    code, output, errors = tool(*flags, *more, cwd=folder, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert code == 0, errors
    sent = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    exported = f"--export=ALL,PYTHON={sys.executable},ABLATE={TOOL}"
    passed = ["--grid=tiny.toml", "--folder=runs", "--batch_size=16", "--steps=4"]
    options = ["--output=runs/slurm_%A_%a.out", "--partition=gpu"]
    assert [[*line[:6], *sorted(line[6:])] for line in sent] == [
        ["--parsable", "--array=0-1%2", exported, *options, str(ARRAY), *sorted(passed)]
    ]
    assert "job 77: WEIGHTING = @KL(), student/Adam.lr = 0.001; WEIGHTING = @KL(), student/Adam.lr = 0.5" in output


def test_without_sbatch_the_commands_can_still_be_seen(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    code, _, errors = tool("--grid=tiny.toml", "--slurm", cwd=tmp_path, PATH="/nowhere")
    assert code == 1
    assert errors == "error: --slurm: there is no sbatch on PATH; run it on a login node, or see --slurm_dry_run\n"
    code, output, _ = tool("--grid=tiny.toml", "--slurm_dry_run", cwd=tmp_path, PATH="/nowhere")
    assert code == 0
    assert output.startswith("sbatch --parsable --array=0-3 --export=ALL,")
    assert output.endswith(f"{ARRAY} --grid=tiny.toml\n")
