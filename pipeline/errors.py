"""Every exception that crosses a module boundary, and the exit code of its branch.

    Exception
    ├── UserError (ValueError)           exit 2: the input is wrong; the message says what is allowed
    │   ├── ConfigError                  run.toml, a recipe or a rubric
    │   ├── UnknownNameError             a name that no file has
    │   ├── SpecError                    a set of shards
    │   ├── QueryError                   SQL
    │   ├── JudgeError                   a judge notices too few planted errors
    │   └── RefusedError                 a command that would do harm
    ├── MachineError (RuntimeError)      exit 1: the input is right, but something broke
    │   ├── BrokenTableError             a table file is damaged
    │   ├── OutOfMemoryError             an allocation failed
    │   ├── ShardFailedError             too many rows of a shard failed
    │   ├── EngineDiedError              a model's process, GPU or server is gone
    │   ├── WorkerDiedError              a worker process was killed
    │   ├── DecoderStartError            no decoder process starts
    │   └── SlurmError                   a Slurm command failed
    ├── StoppedError                     exit 75: stopped by a signal, resumable
    ├── OvertakenError                   never leaves pipeline.execution: another process made the table
    ├── CorpusError (ValueError)         never an exit code: the status and error of a row
    │   ├── UndecodableError             bytes that are not a usable image
    │   ├── UnusableFileError            a file that may not or cannot be read
    │   └── BrokenParquetError           a Parquet file of the corpus that cannot be read
    └── RequestError                     never an exit code: the error of a reply, or a retry
        ├── BadRequestError              this request cannot be answered
        ├── ServerError                  the server failed; a retry may succeed
        └── BodyError                    a response's body cannot be read

An OSError that reaches the command line counts as the machine's: exit 1.
"""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """The input is wrong. The message names the file, the field, the value and what is allowed."""


class ConfigError(UserError):
    """A value in run.toml, in a recipe or in a rubric is wrong."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}")
        self._parts = (where, message)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str], dict[str, object]]:
        return ConfigError, self._parts, self.__dict__


class UnknownNameError(UserError):
    """No plugin, pass, query or file has this name."""


class SpecError(UserError):
    """A set of shards does not parse, or names shards that the plan does not have."""


class QueryError(UserError):
    """SQL does not parse, does not bind, or would do more than read."""


class JudgeError(UserError):
    """A judge notices fewer planted errors than run.toml demands."""


class RefusedError(UserError):
    """The command is understood, but would almost certainly do harm."""


class MachineError(RuntimeError):
    """Something other than the input failed; the message is complete without a traceback."""


class BrokenTableError(MachineError):
    """A table file is not whole, or has changed since it was written."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(f"{path} {message}")
        self.path, self.message = path, message

    def __reduce__(self) -> tuple[type[BrokenTableError], tuple[Path, str]]:
        return BrokenTableError, (self.path, self.message)


class OutOfMemoryError(MachineError):
    """An allocation failed, which is not a sign of damage."""

    def __init__(self, detail: str) -> None:
        advice = "free some, raise the limit (ulimit -v, Slurm's --mem) or use fewer --workers; finished work is kept"
        super().__init__(f"not enough memory: {' '.join(detail.split())}; {advice}")
        self.detail = detail

    def __reduce__(self) -> tuple[type[OutOfMemoryError], tuple[str]]:
        return OutOfMemoryError, (self.detail,)


class ShardFailedError(MachineError):
    """This shard cannot be made; others may be."""


class EngineDiedError(MachineError):
    """An engine's process, GPU or server is gone. Never raised for a single bad request."""


class WorkerDiedError(MachineError):
    """A worker process was killed."""

    def __init__(self) -> None:
        super().__init__("a worker process was killed, perhaps for lack of memory; try fewer --workers")


class DecoderStartError(MachineError):
    """Decoder processes do not start. Never raised because of a file's content."""


class SlurmError(MachineError):
    """A Slurm command failed; the message is Slurm's own."""


class StoppedError(Exception):
    """A signal asked to stop; finished rows are on disk."""


class OvertakenError(Exception):
    """Another process put the same table in place first."""


class CorpusError(ValueError):
    """A file or sample of the corpus is unusable; the message goes into its row."""


class UndecodableError(CorpusError):
    """The bytes hold no picture that a model could be shown."""


class UnusableFileError(CorpusError):
    """A file of the corpus may not be read or cannot be read."""


class BrokenParquetError(CorpusError):
    """A Parquet file of the corpus, or a range of it, cannot be read."""


class RequestError(Exception):
    """One attempt at one request failed; other requests may succeed."""


class BadRequestError(RequestError):
    """The request cannot be answered; a retry would fail too."""


class BodyError(RequestError):
    """The body of a response is too large, or does not decompress."""


class ServerError(RequestError):
    """The server did not answer properly; a retry may succeed."""

    def __init__(self, message: str, *, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait  # seconds that the server asks clients to wait
