"""Preemption: a signal costs nothing that was done, and the process says so by its exit code."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from ratiograph import config
from ratiograph.training import checkpoints, trainer
from ratiograph.training.preemption import EXIT_CODE, Preempted, Preemption

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["Experiment.evaluator = None", "Experiment.batch_size = 16", "Experiment.log_every = 4", "MLP.width = 8"]

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]


def send(number):
    os.kill(os.getpid(), number)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_step_and_is_named(number):
    before, reached = handlers(), []

    def run():
        with Preemption() as preemption, preemption.at_step_ends():
            preemption.end_if_received(2, 9)
            send(number)
            reached.append(preemption.received)
            preemption.end_if_received(3, 9)

    with pytest.raises(
        Preempted, match=rf"{number.name} after step 3 of 9, and its checkpoint is written.*same command"
    ):
        run()
    assert reached == [number.name]
    assert handlers() == before


def test_under_nohup_a_terminal_s_end_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            send(signal.SIGHUP)
        assert preemption.received == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_printed_to_a_closed_terminal_is_no_error():
    """The process's terminal closes, which sends SIGHUP, and printing goes on until its step ends."""
    pid, terminal = pty.fork()
    if not pid:
        code = 1
        with suppress(BaseException):
            try:
                with Preemption() as preemption, preemption.at_step_ends():
                    os.write(1, b"ready")
                    while not preemption.received:
                        time.sleep(0.01)
                    os.write(1, b"saved")
            except Preempted:
                code = EXIT_CODE
        os._exit(code)
    os.read(terminal, 5)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == EXIT_CODE


def test_a_signal_after_the_ranks_were_asked_waits_for_the_next_question():
    """Otherwise this rank would end a step before the others."""
    answers = []

    def run():
        with Preemption() as preemption, preemption.at_step_ends():
            asked = bool(preemption.received)
            send(signal.SIGUSR1)
            answers.append(preemption.join(asked))
            answers.append(preemption.join(bool(preemption.received)))

    with pytest.raises(Preempted, match="SIGUSR1"):
        run()
    assert answers == [False, True]
    other = Preemption()
    assert other.join(True)
    assert other.received == "another rank's signal"


def test_outside_steps_a_signal_ends_at_once_and_later_ones_change_nothing():
    reached = []

    def run():
        with Preemption():
            try:
                send(signal.SIGUSR1)
                reached.append("body")
            finally:
                send(signal.SIGTERM)
                send(signal.SIGUSR1)
                reached.append("clean-up")

    with pytest.raises(Preempted, match="stopped by SIGUSR1"):
        run()
    assert reached == ["clean-up"]


def test_a_second_interrupt_ends_at_once_but_no_other_second_signal():
    reached = []

    def run():
        with Preemption() as preemption, preemption.at_step_ends():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                send(number)
            reached.append(preemption.received)
            send(signal.SIGINT)
            reached.append("after it")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached == ["SIGTERM"]


def test_it_is_not_an_exception_that_libraries_catch():
    assert not issubclass(Preempted, Exception)


def test_another_thread_may_train():
    found = []
    before = handlers()
    thread = threading.Thread(target=lambda: found.append(Preemption().__enter__().received))
    thread.start()
    thread.join()
    assert (found, handlers()) == ([""], before)


def build(steps=12, *changes):
    torch.manual_seed(0)
    lines = [*SMALL, "Experiment.checkpoint_every = 100", *changes]
    return config.build(config.parse(["gin/mixture2d_scores.gin"], lines, {"Experiment.steps": steps}))


def student(workdir):
    step, state = checkpoints.latest(workdir / "checkpoints")
    return step, state["task"]["networks"]["student"]


def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path):
    trainer.train(build(), workdir=tmp_path / "whole", device="cpu")
    experiment = build()
    step = experiment.task.step
    taken = []

    def interrupted(*arguments):
        taken.append(step(*arguments))
        if len(taken) == 5:
            send(signal.SIGTERM)
            send(signal.SIGUSR1)
        return taken[-1]

    experiment.task.step = interrupted
    with pytest.raises(Preempted, match="SIGTERM after step 5 of 12"):
        trainer.train(experiment, workdir=tmp_path / "halves", device="cpu")
    assert len(taken) == 5
    assert student(tmp_path / "halves")[0] == 5
    assert json.loads((tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 5
    trainer.train(build(), workdir=tmp_path / "halves", device="cpu")
    (steps, whole), (_, halves) = student(tmp_path / "whole"), student(tmp_path / "halves")
    assert steps == 12
    for name, value in whole.items():
        assert torch.equal(value, halves[name]), name


def test_two_interrupts_end_the_run_at_once_and_it_goes_on_from_the_last_checkpoint(tmp_path):
    experiment = build(12, "Experiment.checkpoint_every = 2")
    step, taken = experiment.task.step, []

    def interrupted(*arguments):
        taken.append(1)
        if len(taken) == 5:
            send(signal.SIGINT)
            send(signal.SIGINT)
            taken.append("further")
        return step(*arguments)

    experiment.task.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train(experiment, workdir=tmp_path, device="cpu")
    assert len(taken) == 5
    trainer.train(build(12), workdir=tmp_path, device="cpu")
    assert student(tmp_path)[0] == 12


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(tmp_path, monkeypatch):
    """Two signals within a save: the file is whole, and only then the run ends."""
    save = checkpoints.save

    def slow(*arguments, **named):
        send(signal.SIGTERM)
        time.sleep(0.3)
        send(signal.SIGTERM)
        return save(*arguments, **named)

    monkeypatch.setattr(checkpoints, "save", slow)
    with pytest.raises(Preempted, match="stopped by SIGTERM after step"):
        trainer.train(build(200_000, "Experiment.checkpoint_every = 3"), workdir=tmp_path, device="cpu")
    step, _ = student(tmp_path)
    assert step >= 3
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_signal_during_the_final_evaluation_leaves_a_run_that_only_finishes(tmp_path):
    experiment = build(4)
    experiment.task.weights = lambda: send(signal.SIGUSR1) or {}
    with pytest.raises(Preempted, match="stopped by SIGUSR1"):
        trainer.train(experiment, workdir=tmp_path, device="cpu")
    again = build(4)
    again.task.step = None  # would fail if it were called
    trainer.train(again, workdir=tmp_path, device="cpu")
    assert (tmp_path / "student.safetensors").is_file()


def test_the_command_ends_with_75_and_goes_on(tmp_path):
    lines = [f"--gin_param={line}" for line in [*SMALL, "student/Adam.cooldown = None"]]
    command = [sys.executable, ROOT / "launch" / "main.py", "--gin_file=gin/mixture2d_scores.gin", *lines]
    command += [f"--workdir={tmp_path}", "--device=cpu"]
    process = subprocess.Popen(
        [*command, "--steps=100000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE == 75, error
    step, _ = student(tmp_path)
    assert error.endswith(
        f"stopped by SIGUSR1 after step {step} of 100000, and its checkpoint is written. "
        "The same command goes on from there\n"
    )
    again = config.build(config.parse([str(tmp_path / "config.gin")], [], {"Experiment.steps": step + 4}))
    trainer.train(again, workdir=tmp_path, device="cpu")
    assert student(tmp_path)[0] == step + 4
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == sorted(set(logged))
