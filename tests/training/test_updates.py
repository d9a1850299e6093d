"""Which updates of a step wait for their gradients, and until when."""

from __future__ import annotations

import pytest
import torch

from ratiograph.training.updates import Updates


class Told:
    """Stands for an optimiser; writes down what it is asked to do."""

    def __init__(self, name: str, travels: bool, log: list[str]):
        self.name, self.travels, self.log = name, travels, log

    def begin(self) -> bool:
        self.log.append(f"{self.name} begins")
        return self.travels

    def step(self) -> torch.Tensor:
        self.log.append(f"{self.name} steps")
        return torch.tensor(float(len(self.log)))


def told(travels: bool) -> tuple[Updates, list[str]]:
    log: list[str] = []
    return Updates({name: Told(name, travels, log) for name in ("a", "b", "c")}), log


def test_an_update_without_an_exchange_is_taken_at_once():
    updates, log = told(travels=False)
    updates.begin("b", lambda: log.append("then"))
    updates.begin("a")
    updates.finish()
    assert log == ["b begins", "b steps", "then", "a begins", "a steps"]
    assert updates.norms == {"b": 2.0, "a": 5.0}


def test_updates_wait_until_they_are_asked_for():
    updates, log = told(travels=True)
    updates.begin("b", lambda: log.append("then"))
    updates.begin("a")
    updates.begin("c")
    updates.finish(["c", "b"])  # in the order in which they began
    assert log == ["b begins", "a begins", "c begins", "b steps", "then", "c steps"]
    updates.finish([])
    updates.begin("b")
    updates.finish()
    updates.finish()
    assert log[6:] == ["b begins", "a steps", "b steps"]


def test_a_network_has_one_update_at_a_time():
    updates, _ = told(travels=True)
    updates.begin("a")
    with pytest.raises(AssertionError):
        updates.begin("a")
