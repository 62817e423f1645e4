"""An error is the data's only if it comes twice, the second time alone and with memory to spare."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable

import pytest

from pipeline import machine
from pipeline.errors import BrokenTableError, MachineError, OutOfMemoryError

SHORTAGES = [
    MemoryError(),
    MemoryError("malloc of size 7 failed"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError("ZSTD decompression failed: Allocation error : not enough memory"),
    RuntimeError("can't start new thread"),
    OSError("Couldn't deserialize thrift: std::bad_alloc\n"),
    ImportError("libarrow.so: failed to map segment from shared object"),
]
DAMAGES = [OSError("Corrupt snappy compressed data."), ValueError("no magic bytes"), EOFError()]
DISKS = [OSError(errno.EIO, "Input/output error"), FileNotFoundError(errno.ENOENT, "No such file or directory")]


def fail_with(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("first", [*DAMAGES, *SHORTAGES[:2], *SHORTAGES[3:]], ids=repr)
def test_what_fails_twice_with_memory_to_spare_is_the_datas(first: Exception) -> None:
    machine.rule_out(first, fail_with(first), needed=1)


@pytest.mark.parametrize("first", [*DAMAGES, *SHORTAGES], ids=repr)
@pytest.mark.parametrize("again", [lambda: None, fail_with(OSError(errno.EIO, "Input/output error"))])
def test_what_does_not_fail_twice_is_the_machines(first: Exception, again: Callable[[], None]) -> None:
    with pytest.raises((MachineError, OSError)):
        machine.rule_out(first, again, needed=1)


@pytest.mark.parametrize("first", [*DAMAGES, *SHORTAGES], ids=repr)
def test_without_memory_to_spare_it_is_the_machines(first: Exception) -> None:
    with pytest.raises((OutOfMemoryError, OSError), match="memory"):
        machine.rule_out(first, fail_with(first), needed=1 << 60)


@pytest.mark.parametrize("error", DISKS, ids=repr)
def test_errors_of_the_system_are_the_machines_at_once(error: OSError) -> None:
    with pytest.raises(OSError) as raised:
        machine.rule_out(error, lambda: None)
    assert raised.value is error


@pytest.mark.parametrize("error", SHORTAGES, ids=repr)
def test_failed_allocations_are_named_in_one_line(error: Exception) -> None:
    trouble = machine.find_trouble(error)
    assert isinstance(trouble, OutOfMemoryError)
    assert "not enough memory" in str(trouble) and "\n" not in str(trouble)
    assert str(pickle.loads(pickle.dumps(trouble))) == str(trouble)


def test_damage_is_no_trouble_of_the_machine() -> None:
    assert [machine.find_trouble(error) for error in DAMAGES] == [None] * len(DAMAGES)
    assert not issubclass(BrokenTableError, OutOfMemoryError)
    assert 0 < machine.free_memory() < 1 << 60
