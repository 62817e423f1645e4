"""Decides what the commands are called and how they end: stdout is data, all else is stderr, and the exit code tells.

0: all asked for is done. 1: the machine failed on some shard. 2: the user's input is wrong. 75: stopped, resumable.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.errors import MachineError, StoppedError, UserError

if TYPE_CHECKING:
    from pipeline.execution.runner import Outcome

app = typer.Typer(
    name="recap",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From an image corpus to a better-captioned training set: shard, caption, score, filter, export.",
)

RunOption = Annotated[Path, typer.Option("--run", help="The run's folder.", show_default="the one you stand in")]


@app.command(epilog="Example: recap demo runs/demo --images 1000 --engine vllm")
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the run is made.")] = Path("runs/demo"),
    images: Annotated[int | None, typer.Option(help="How many images.", min=1, show_default="400")] = None,
    engine: Annotated[
        Literal["transformers", "vllm"] | None,
        typer.Option(help="What runs the models; `make vllm` installs vLLM.", show_default="transformers"),
    ] = None,
) -> None:
    """The whole pipeline on the embedded default."""
    from pipeline.commands import demo

    outcome, summary = demo.run_demo(folder, num_images=images, engine=engine)
    _tell(outcome)
    if outcome.exit_code == 0:
        print("\n".join(summary))
    raise typer.Exit(outcome.exit_code)


@app.command(epilog="Example: recap init runs/photos --source ~/photos --engine vllm --model internlm/CapRL-3B")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The run's folder; it is made.")],
    source: Annotated[str, typer.Option(help="A folder, tars, Parquet, a URL, hf:NAME, or scenes.")],
    kind: Annotated[str | None, typer.Option(help="The kind of source, when the guess would be wrong.")] = None,
    engine: Annotated[
        str, typer.Option(help="What captions: vllm, transformers, openai; echo needs no model and makes words up.")
    ] = "echo",
    model: Annotated[str | None, typer.Option(help="The captioner: a Hugging Face name or a folder.")] = None,
    shard_size: Annotated[int, typer.Option(help="Images in a shard.", min=1)] = 1000,
) -> None:
    """Write DIR/run.toml, each line explained, and freeze DIR/plan.parquet."""
    from pipeline.commands import init
    from pipeline.progress import say

    guessed = init.guess_source(source, kind=kind)
    sections = init.default_sections({**guessed, "shard_size": shard_size}, engine=engine, model=model)
    run, num_shards = init.create_run(folder, sections)
    if beside := init.describe_ignored_files(sections["source"]):
        say(f"recap: {beside}")
    say(f"{run.file}: a {run.source.kind} source in {num_shards} shards; all can be changed there")
    if engine == "echo":
        say("its engine is `echo`, which makes words up: good for a first look. Name your model in [engines.captioner]")
    if engine == "openai":
        say("its server is to be started by `recap serve captioner`; for another, write its URL in [engines.captioner]")
    there = shlex.quote(str(folder))
    say(f"next: recap try caption:dense --run {there}, then recap run all --run {there}")


@app.command(epilog="Example: recap plan --run runs/photos")
def plan(run: RunOption = Path()) -> None:
    """Extend the plan after the corpus grew: new shards at the end, no key moves."""
    from pipeline import config
    from pipeline.commands import init
    from pipeline.progress import say

    before, after = init.extend_plan(config.load(run))
    say(f"{after} shards, {after - before} of them new")


@app.command("try", epilog="Example: recap try caption:dense --images 5")
def attempt(
    what: Annotated[str, typer.Argument(metavar="STAGE:NAME", help="A caption or score pass.")],
    images: Annotated[int, typer.Option(help="How many images.", min=1)] = 20,
    run: RunOption = Path(),
) -> None:
    """A pass on a few images, shown side by side; nothing is written into the run."""
    from pipeline import config
    from pipeline.commands import preview

    for line in preview.preview_passes(config.load(run), what, num_images=images):
        print(line)


@app.command("run", epilog="Example: recap run caption --shard 0-99 --run runs/photos")
def run_stage(
    stage: Annotated[
        str,
        typer.Argument(metavar="STAGE[:NAME]", help="ingest, caption, rubric, score, filter, export, train or all."),
    ],
    run: RunOption = Path(),
    shard: Annotated[str, typer.Option(help="7, 0-9, 0-99:10, 3,5,8-11, i/n (the i-th of n blocks) or all.")] = "all",
    workers: Annotated[int, typer.Option(help="Processes; each has an engine and GPUs of its own.", min=1)] = 1,
    stale: Annotated[
        Literal["stop", "redo", "keep"],
        typer.Option(help="What to do with tables that other words or inputs made."),
    ] = "stop",
    retry: Annotated[str, typer.Option(help="Ask again for the rows with these statuses, e.g. error,truncated.")] = "",
) -> None:
    """Make what is missing of a stage. Finished work is skipped; interrupted runs resume."""
    from pipeline import config
    from pipeline.execution import whole_run
    from pipeline.execution.passes import select_passes
    from pipeline.execution.run_state import RunState
    from pipeline.execution.runner import Runner

    state = RunState(config.load(run), shards=shard, stale=stale)
    if module := whole_run.load_stage(stage):
        if (shard, workers, retry) != ("all", 1, ""):
            raise UserError(f"{stage}: it is made from all shards; --shard, --workers and --retry are not for it")
        print(whole_run.make_product(module, state))
        return
    runner = Runner(state, workers=workers, retry=frozenset(filter(None, retry.split(","))))
    outcome = runner.execute(select_passes(state.passes, stage))
    _tell(outcome)
    raise typer.Exit(outcome.exit_code)


@app.command(epilog="Example: recap status --run runs/photos --json | jq '.[].num_missing'")
def status(
    run: RunOption = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Per pass: done, missing, stale, failed rows, rate, time left; missing shards as a Slurm --array expression."""
    from pipeline import config
    from pipeline.commands import status as report
    from pipeline.execution.run_state import RunState
    from pipeline.progress import say
    from pipeline.slurm.jobs import JobMonitor
    from pipeline.storage.views import find_leftovers

    state = RunState(config.load(run))
    watch = JobMonitor.query(state)
    passes = report.summarise_passes(state, watch)
    print(json.dumps(report.as_json(passes), indent=2) if as_json else report.format_table(passes, watch))
    if folders := find_leftovers(state.run):
        say(f"recap: left over, of passes that run.toml does not have (nothing reads them): {', '.join(folders)}")


Format = Annotated[Literal["table", "csv", "json", "parquet"], typer.Option(help="How to print; parquet is binary.")]


@app.command(epilog="""Example: recap sql "SELECT status, count(*) FROM caption GROUP BY ALL" --run runs/photos""")
def sql(
    query: Annotated[
        str,
        typer.Argument(
            metavar="SELECT", help="Over plan, image, caption, rubric, score, verdict, export, step, stats."
        ),
    ],
    run: RunOption = Path(),
    format: Format = "table",
) -> None:
    """Ask the run's tables in SQL, read-only."""
    from pipeline import config
    from pipeline.storage import database, views

    with views.connect(config.load(run)) as connection:
        database.print_query(connection, query, format, sys.stdout.buffer)


@app.command(epilog="Example: recap query yield --run runs/photos")
def query(
    name: Annotated[str, typer.Argument(help="One of the named queries; without it they are listed.")] = "",
    run: RunOption = Path(),
    format: Format = "table",
) -> None:
    """A named query of manifests/queries."""
    from pipeline import config
    from pipeline.storage import database, views

    if not name:
        print("\n".join(f"{title:12} {sentence}" for title, sentence in database.list_queries()))
        return
    with views.connect(config.load(run)) as connection:
        database.print_query(connection, database.read_query(name), format, sys.stdout.buffer)


@app.command(epilog="Example: recap schema > run.schema.json")
def schema() -> None:
    """Print the JSON Schema of run.toml, for editors."""
    from pipeline.commands.schema import build_schema

    print(json.dumps(build_schema(), indent=2, ensure_ascii=False))


@app.command(epilog="Example: recap report --run runs/photos --images 60")
def report(
    run: RunOption = Path(),
    images: Annotated[int, typer.Option(help="How many samples are shown.", min=1, max=1000)] = 36,
) -> None:
    """Write report.html into the run: what came of it in numbers and pictures, in one file; prints its path."""
    from pipeline import config
    from pipeline.report import render

    print(render.write_report(config.load(run), num_images=images))


@app.command(epilog="Example: recap serve judge --run runs/photos")
def serve(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="A name in [engines].")],
    run: RunOption = Path(),
    host: Annotated[
        str, typer.Option(help="Where to listen; on any but loopback an API key is demanded.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 0,
    ready_timeout: Annotated[float, typer.Option(help="Seconds until a server that is not ready is given up.")] = 1800,
) -> None:
    """Start the vLLM server that an engine of run.toml describes; base_url = "endpoint" finds it."""
    from pipeline import config
    from pipeline.commands import serve as server

    server.serve_engine(config.load(run), engine, host=host, port=port, ready_timeout=ready_timeout)


slurm = typer.Typer(help="The run as chained Slurm array jobs.", no_args_is_help=True)
app.add_typer(slurm, name="slurm")
Stages = Annotated[list[str] | None, typer.Argument(metavar="[STAGE[:NAME]]...", show_default="all")]
StaleOption = Annotated[Literal["stop", "redo", "keep"], typer.Option(help="What to do with stale tables.")]


@slurm.command(epilog="Example: recap slurm script caption --run runs/photos")
def script(stages: Stages = None, run: RunOption = Path(), stale: StaleOption = "stop") -> None:
    """Print the scripts of what is missing, as `submit` would submit them."""
    from pipeline import config
    from pipeline.slurm import submit

    state, chosen = submit.select_jobs(config.load(run), stages or ["all"], stale=stale)
    print("\n".join(submit.render_scripts(state, chosen)), end="")


@slurm.command("submit", epilog="Example: recap slurm submit --run runs/photos")
def submit_jobs(stages: Stages = None, run: RunOption = Path(), stale: StaleOption = "stop") -> None:
    """Submit what is missing and not in the queue yet; safe to repeat."""
    from pipeline import config
    from pipeline.progress import say
    from pipeline.slurm import submit

    state, chosen = submit.select_jobs(config.load(run), stages or ["all"], stale=stale)
    num = submit.submit_jobs(state, chosen)
    say(f"{num} tasks submitted" if num else "nothing to submit: all is done, or on its way")


def main() -> None:
    """The command `recap`."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"recap: {error}", file=sys.stderr)
        sys.exit(2)
    except StoppedError:
        sys.exit(75)
    except BrokenPipeError:  # `recap sql ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, MachineError) as error:
        print(f"recap: {error}", file=sys.stderr)
        sys.exit(1)


def _tell(outcome: Outcome) -> None:
    from pipeline.progress import say

    made = f"{outcome.done} shard tables made, {outcome.skipped} done before"
    failed = f", {len(outcome.failures)} failed" if outcome.failures else ""
    say(f"{made}{failed}" + ("; stopped, the same command goes on" if outcome.stopped else ""))
