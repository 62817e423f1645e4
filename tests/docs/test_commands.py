"""Every `recap` command line in README and docs: all parse, and those that a CPU without servers can run are run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli import app
from tests.support import corpora
from tests.support.pages import list_blocks, list_inline_commands, list_shell_commands
from tests.support.runs import ROOT, recap

NOT_RUN = {  # the beginning of a command -> why no test of this file runs it
    ("run", "train"): "trains a model; tests/training runs it",
    ("audit", "--labels"): "reads what people saved; tests/audit runs it",
    ("serve",): "starts vLLM; tests/commands/test_serve.py runs it",
    ("push",): "uploads; tests/commands/test_push.py runs it",
    ("slurm", "submit"): "needs Slurm; tests/slurm runs it",
    ("slurm", "script"): "needs [slurm] on a cluster; tests/slurm compares the script with the page",
}
OPTIONS_NOT_RUN = {
    "--workers": "starts eight processes; tests/execution/test_workers.py runs two",
    "vllm": "needs vLLM",
}
COMMANDS = [list(words) for words in dict.fromkeys(map(tuple, list_shell_commands()))]


def reason_not_run(words: list[str]) -> str:
    begins = (why for start, why in NOT_RUN.items() if tuple(words[: len(start)]) == start)
    has = (why for option, why in OPTIONS_NOT_RUN.items() if option in words)
    return next(begins, "") or next(has, "")


@pytest.mark.parametrize("words", [*COMMANDS, *list_inline_commands()], ids=" ".join)
def test_command_and_options_exist(words: list[str]) -> None:
    command, arguments = find_command(words)
    known = {option for param in command.params for option in (*param.opts, "--help")}
    assert {word for word in arguments if word.startswith("--")} <= known


def test_every_command_is_in_a_shell_block() -> None:
    texts = [block for block in list_blocks("text") if re.search(r"^recap ", block.text, re.MULTILINE)]
    assert [block.id for block in texts] == []


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_parses(words: list[str]) -> None:
    command, arguments = find_command(words)
    command.make_context(command.name, list(arguments))


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, and its arguments; COMMAND is any command."""
    command: Any = typer.main.get_command(app)
    while words and words[0] != "COMMAND" and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    is_complete = not hasattr(command, "commands") or words[0] == "COMMAND" or words[0].startswith("--")
    assert is_complete, words
    return command, words


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words in COMMANDS if not reason_not_run(words)], ids=" ".join)
def test_command_runs(words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "init":
        shutil.rmtree(home / "runs" / "photos")
    if "runs/mine" in words:
        (home / "runs" / "photos").rename(home / "runs" / "mine")
    for other in {"runs/old", "runs/new"} & set(words):
        shutil.copytree(home / "runs" / "photos", home / other)
    if words[0] not in ("compare", "init", "demo", "query", "schema", "sql") and "--run" not in words:
        monkeypatch.chdir(home / "runs" / "photos")
    arguments = [word.replace("~", str(home)) for word in words]
    done = recap(*arguments)
    assert done.stdout or done.stderr


def test_commands_that_are_not_run_exist_for_their_reason() -> None:
    for start in NOT_RUN:
        assert any(tuple(words[: len(start)]) == start for words in COMMANDS), start


@pytest.mark.slow
def test_demo_prints_what_the_readme_shows(tmp_path: Path) -> None:
    done = recap("demo", tmp_path / "demo", "--images", 12)
    (shown,) = re.findall(
        r"(?:^    .*tables made.*\n)(?:^    .*\n|\n)*", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert set(normalise(shown)) <= set(normalise(done.stdout + done.stderr))


@pytest.mark.slow
def test_an_edited_recipe_is_reported_as_documented(home: Path) -> None:
    (shown,) = [block.text for block in list_blocks("console") if "recap: stale:" in block.text]
    text = (ROOT / "stages" / "recipes" / "dense.toml").read_text()
    (home / "runs" / "photos" / "recipes" / "dense.toml").write_text(text.replace("in detail", "in great detail"))
    done = recap("run", "all", "--run", "runs/photos", check=False)
    assert done.returncode == 2
    command, summary, *lines, hint = shown.splitlines()
    assert command.startswith("$ recap run all")
    assert done.stderr.startswith(summary[: summary.index(" (")])
    assert {line for line in (*lines, hint) if line != "  ..."} <= set(done.stderr.splitlines())


@pytest.mark.slow
def test_photographs_print_what_is_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpora.write_photographs(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    recap("init", "runs/photos", "--source", "photos", "--shard-size", 50)
    recap("run", "all", "--run", "runs/photos")
    blocks = [block.text.partition("\n") for block in list_blocks("console")]
    for command in ("recap query statuses", "recap try caption:dense"):
        ((line, _, shown),) = [block for block in blocks if block[0].startswith(f"$ {command}")]
        printed = recap(*shlex.split(line)[2:]).stdout
        assert first_words(shown) == first_words(printed)


def first_words(text: str) -> list[list[str]]:
    """What is the same in every run: equal counts have no order, and a commonest error may be one of several."""
    return sorted(line.split()[:3] for line in text.splitlines() if line)


def normalise(text: str) -> list[str]:
    """Lines with 0 for every number and duration, so that runs of different sizes compare."""
    return [" ".join(re.sub(r"(\d+ (h|min) )*[\d.,]+", "0", line).split()) for line in text.splitlines()]
