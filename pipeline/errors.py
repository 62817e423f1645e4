"""Decides which errors are the user's: exit 2, with a message that says what to do. All others are the machine's."""

from __future__ import annotations


class UserError(ValueError):
    """What was asked cannot be done as asked. The message names the file, the field, the value and what is allowed."""


class ConfigError(UserError):
    """Something in run.toml, in a recipe or in a rubric is wrong."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}")
        self._parts = (where, message)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str], dict[str, object]]:
        return ConfigError, self._parts, self.__dict__


class UnknownNameError(UserError):
    """A name that no file answers to."""


class SpecError(UserError):
    """A set of shards that cannot be read, or that the plan does not have."""


class QueryError(UserError):
    """SQL that does not parse, does not bind, or would do more than read."""


class RefusedError(UserError):
    """A command that would do what its user surely does not want."""


class MachineError(RuntimeError):
    """The machine failed, not the user: exit 1, and the message says it all."""
