"""The learning curve as a table."""

from __future__ import annotations

from pipeline.records import Step
from stages.training.curve import list_points


def test_points_are_in_order_and_unique() -> None:
    log = [{"step": 2, "loss": 1.0, "epoch": 0.1}, {"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 3.0, "loss": 1.0}]
    assert list_points(log) == [
        Step(step=1, name="loss", value=2.0),
        Step(step=2, name="eval_loss", value=3.0),
        Step(step=2, name="loss", value=1.0),
    ]
