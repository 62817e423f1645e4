"""What is known of how far the judges and the filter of a run can be trusted, in lines to print.

stages/audit finds it; none of it is imported for a run that has neither canaries nor a certificate.
"""

from __future__ import annotations

from types import ModuleType

from pipeline import plugins
from pipeline.sections import Run
from pipeline.storage.layout import CERTIFICATE


def load_command(name: str) -> ModuleType:
    """The package of stages/ that is the command `recap NAME`.

    It has `run_command(run: Run, **options) -> Iterator[str]`, which yields the lines to print.
    """
    return plugins.load("stages", name)


def describe_judges(run: Run) -> list[str]:
    """Lines on how far judges notice planted errors; none without [canary]."""
    return list(load_command("audit").describe_judges(run)) if run.sections["canary"] else []


def describe_certificate(run: Run) -> list[str]:
    """Lines on the guarantee that an audit has found, and whether it still holds; none without one."""
    if not (run.folder / CERTIFICATE).exists():
        return []
    return list(load_command("audit").describe_certificate(run))
