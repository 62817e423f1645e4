"""The command line: stdout is data, everything else goes to stderr, and the exit code is the result.

0: everything requested is done. 1: the machine failed on some shard. 2: the user's input is wrong. 75: stopped by a
signal, resumable. 3: stopped by max_hours or max_tokens, resumable when raised.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.errors import StoppedError, UserError
from pipeline.machine import find_trouble

if TYPE_CHECKING:
    from pipeline.execution.runner import Outcome

app = typer.Typer(
    name="recap",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn an image corpus into a better-captioned training set: shard, caption, score, filter, export.",
)
slurm = typer.Typer(help="Run the stages as chained Slurm array jobs.", no_args_is_help=True)


def complete_passes(ctx: typer.Context, incomplete: str) -> list[str]:
    from pipeline.commands import completion

    return completion.complete(completion.complete_passes, ctx.params.get("run") or Path(), incomplete)


def complete_engines(ctx: typer.Context, incomplete: str) -> list[str]:
    from pipeline.commands import completion

    return completion.complete(completion.complete_engines, ctx.params.get("run") or Path(), incomplete)


def complete_queries(ctx: typer.Context, incomplete: str) -> list[str]:
    from pipeline.commands import completion

    return completion.complete(completion.complete_queries, ctx.params.get("run") or Path(), incomplete)


RunOption = Annotated[Path, typer.Option("--run", help="The run's directory.", show_default="current directory")]
ShardOption = Annotated[
    str, typer.Option(help="The shards: 7, 0-9, 0-99:10, 3,5,8-11, i/n (block i of n, from 0) or all.")
]
StaleOption = Annotated[
    Literal["stop", "redo", "keep"],
    typer.Option(help="For stale tables: stop with an error, redo them, or keep using them."),
]
Format = Annotated[
    Literal["table", "csv", "json", "parquet"], typer.Option(help="The output format; parquet is binary.")
]
Stages = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[STAGE[:NAME]]...",
        help="Stages or passes, as for `recap run`.",
        show_default="all",
        autocompletion=complete_passes,
    ),
]


def print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        print(f"recap {version('recap-pipeline')}")
        raise typer.Exit


@app.callback()
def parse_common_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
    ] = False,
) -> None: ...


@app.command("demo", epilog="Example: recap demo runs/demo --images 1000 --engine vllm")
def run_demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The run's directory; created if missing.")] = Path(
        "runs/demo"
    ),
    images: Annotated[int | None, typer.Option(help="Number of images.", min=1, show_default="400")] = None,
    engine: Annotated[
        Literal["transformers", "vllm"] | None,
        typer.Option(help="The engine of both models; `make vllm` installs vLLM.", show_default="transformers"),
    ] = None,
) -> None:
    """Run every stage on generated images with the built-in models.

    Prints a summary, with the captions' precision and recall against the known truth of the images.
    """
    from pipeline.commands import demo

    outcome, summary = demo.run_demo(folder, num_images=images, engine=engine)
    report_outcome(outcome)
    if outcome.exit_code == 0:
        print("\n".join(summary))
    raise typer.Exit(outcome.exit_code)


@app.command(
    "init",
    epilog="Example: recap init runs/real --source ~/photos --engine vllm --model Qwen/Qwen2.5-VL-3B-Instruct",
)
def init_run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The run's directory; created if missing.")],
    source: Annotated[str, typer.Option(help="A directory, tars, Parquet files, a URL, hf:NAME, or scenes.")],
    kind: Annotated[str | None, typer.Option(help="The kind of source, if it should not be guessed.")] = None,
    engine: Annotated[
        str,
        typer.Option(help="The captioner's engine: vllm, transformers, openai, or echo, which invents text."),
    ] = "echo",
    model: Annotated[str | None, typer.Option(help="The captioner: a Hugging Face name or a directory.")] = None,
    shard_size: Annotated[int, typer.Option(help="Number of images in a shard.", min=1)] = 1000,
) -> None:
    """Create a run: DIR/run.toml with comments, and its plan.

    run.toml explains each key and shows its default. The plan assigns every image of the corpus to a shard.
    """
    from pipeline.commands import init
    from pipeline.progress import format_quantity, say

    guessed = init.guess_source(source, kind=kind)
    sections = init.default_sections({**guessed, "shard_size": shard_size}, engine=engine, model=model)
    run, num_shards = init.create_run(folder, sections)
    if warning := init.describe_ignored_files(sections["source"]):
        say(f"recap: {warning}")
    shards = format_quantity(num_shards, "shard")
    about = f"a {run.source.kind} source of {init.describe_size(run)} in {shards}"
    say(f"{run.file}: {about}; edit the file to change anything")
    say(init.describe_disk_use(run))
    if engine == "echo":
        say("its engine is `echo`, which invents captions and random scores, so most captions are refused")
        say("to caption images, set a model in [engines.captioner]")
    else:
        say("the judge is the captioner itself; for another, add its engine to run.toml and name it in [score.judge]")
    if engine == "openai":
        say("start its server with `recap serve captioner`, or set the URL of another in [engines.captioner]")
    quoted = shlex.quote(str(folder))
    say(f"next: recap try caption:dense --run {quoted}, then recap run all --run {quoted}")


@app.command("plan", epilog="Example: recap plan --run runs/photos")
def extend_plan(run: RunOption = Path()) -> None:
    """Add the new images of a grown corpus to the plan.

    They form new shards at the end; no image moves to another shard.
    """
    from pipeline import config
    from pipeline.commands import init
    from pipeline.progress import format_quantity, say

    loaded = config.load(run)
    before, after = init.extend_plan(loaded)
    say(f"{format_quantity(after, 'shard')}, {after - before} of them new")
    if after > before:
        say(init.describe_disk_use(loaded, first=before))


@app.command("try", epilog="Example: recap try caption:dense --images 5")
def try_pass(
    name: Annotated[
        str,
        typer.Argument(
            metavar="STAGE:NAME", help="A find, caption, rubric or score pass.", autocompletion=complete_passes
        ),
    ],
    images: Annotated[int, typer.Option(help="Number of images.", min=1)] = 20,
    prompts: Annotated[bool, typer.Option("--prompts", help="Print what the models are asked, too.")] = False,
    run: RunOption = Path(),
) -> None:
    """Run a pass on a few random images and print the results.

    They are images that the pass asks for (`where`), and the same ones each time. Nothing is written into the run.
    """
    from pipeline import config
    from pipeline.commands import preview
    from pipeline.progress import escape_controls

    for line in preview.preview_passes(config.load(run), name, num_images=images, with_prompts=prompts):
        print(escape_controls(line))


@app.command("check", epilog="Example: recap check --run runs/photos")
def check_run(run: RunOption = Path()) -> None:
    """Find what would stop the run, before it begins.

    Prints a line for each thing that was checked: the configuration, models, servers, disk, limits of the machine and
    of Slurm, and then a few pictures through every pass. Exits with 2 if a line is not fine.
    """
    from pipeline.commands import check
    from pipeline.progress import escape_controls

    is_fine = True
    for finding in check.check_run(run):
        print(escape_controls(str(finding)), flush=True)
        is_fine &= finding.kind == "fine"
    raise typer.Exit(0 if is_fine else 2)


@app.command("estimate", epilog="Example: recap estimate --tasks 64 --price 2.5 --run runs/photos")
def estimate_run(
    run: RunOption = Path(),
    images: Annotated[int, typer.Option(help="Number of random images to try.", min=2)] = 256,
    tasks: Annotated[int, typer.Option(help="Processes that will work at the same time.", min=1)] = 1,
    price: Annotated[float | None, typer.Option(help="The price of a GPU-hour.", min=0, show_default="none")] = None,
) -> None:
    """Estimate tokens, hours, cost, files and bytes of the whole run.

    Sends random images of the plan through every pass, in a temporary directory. `recap status` compares what finished
    shards took with the last estimate.
    """
    import shutil

    from pipeline import config
    from pipeline.commands import estimate

    loaded = config.load(run)
    estimated = estimate.estimate_run(loaded, num_images=images, num_tasks=tasks, price=price)
    print("\n".join(estimate.format_estimate(estimated, free=shutil.disk_usage(loaded.folder).free)))


@app.command("run", epilog="Example: recap run caption --shard 0-99 --run runs/photos")
def run_stage(
    stage: Annotated[
        str,
        typer.Argument(
            metavar="STAGE[:NAME]",
            help="ingest, curate, caption, rubric, score, filter, export, train or all.",
            autocompletion=complete_passes,
        ),
    ],
    run: RunOption = Path(),
    shard: ShardOption = "all",
    workers: Annotated[int, typer.Option(help="Processes, each with its own engine and GPUs.", min=1)] = 1,
    stale: StaleOption = "stop",
    retry: Annotated[str, typer.Option(help="Retry the rows with these statuses, e.g. error,truncated.")] = "",
    check: Annotated[
        bool, typer.Option(help="First check source, engines, servers and disk, as `recap check` does.")
    ] = True,
) -> None:
    """Make the missing shards of a stage, or of one of its passes.

    Finished work is skipped; interrupted runs resume.
    """
    from pipeline import config
    from pipeline.commands import summary
    from pipeline.commands.check import require_ready
    from pipeline.execution import whole_run
    from pipeline.execution.pass_graph import select_passes
    from pipeline.execution.run_state import RunState
    from pipeline.execution.runner import Runner
    from pipeline.progress import say

    state = RunState(config.load(run), shards=shard, stale=stale)
    if module := whole_run.load_stage(stage):
        if (shard, workers, retry) != ("all", 1, ""):
            raise UserError(f"{stage} works on all shards at once; --shard, --workers and --retry do not apply to it")
        print(whole_run.make_product(module, state))
        return
    runner = Runner(state, workers=workers, retry=frozenset(filter(None, retry.split(","))))
    passes = select_passes(state.passes, stage)
    if check:
        require_ready(state, passes)
    outcome = runner.execute(passes)
    report_outcome(outcome)
    is_whole = outcome.exit_code == 0 and shard == "all" and stage in ("export", "all")
    if is_whole and state.run.sections["export"][""].url:
        from pipeline.commands import push

        print(push.push_export(state.run, ""))
    if is_whole:
        say("\n".join(summary.format_end(state.run, is_new=outcome.done > 0)))
    raise typer.Exit(outcome.exit_code)


@app.command("status", epilog="Example: recap status --run runs/photos --format json | jq '.[].num_missing'")
def print_status(
    run: RunOption = Path(),
    format: Format = "table",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Show for each pass what is done, missing, stale and failed.

    Also shows rates, the estimated time left, missing shards as a Slurm --array expression, and Slurm jobs.
    """
    from pipeline import audits, config
    from pipeline.commands import status
    from pipeline.execution.run_state import RunState
    from pipeline.progress import escape_controls, say
    from pipeline.slurm.jobs import JobMonitor
    from pipeline.storage.database import find_leftovers

    state = RunState(config.load(run))
    monitor = JobMonitor.query_slurm(state)
    passes = status.summarise_passes(state, monitor)
    status.print_passes(passes, monitor, "json" if as_json else format, sys.stdout.buffer)
    if format == "table" and not as_json:
        for line in (*audits.describe_judges(state.run), *audits.describe_certificate(state.run)):
            print(escape_controls(line))
    if folders := find_leftovers(state.run):
        say(f"recap: unused tables of passes that run.toml no longer has: {', '.join(folders)}")


@app.command("sql", epilog='Example: recap sql "SELECT status, count(*) FROM caption GROUP BY ALL" --run runs/photos')
def run_sql(
    query: Annotated[
        str,
        typer.Argument(
            metavar="SELECT",
            help="A query over plan, image, caption, rubric, score, verdict, export, step and stats.",
        ),
    ],
    run: RunOption = Path(),
    format: Format = "table",
) -> None:
    """Query the run's tables with read-only SQL."""
    from pipeline import config
    from pipeline.commands.sql import print_query
    from pipeline.storage import database

    with database.connect_run(config.load(run)) as connection:
        print_query(connection, query, format, sys.stdout.buffer)


@app.command("query", epilog="Example: recap query yield --run runs/photos")
def run_query(
    name: Annotated[
        str,
        typer.Argument(help="The name of a query; without it, all are listed.", autocompletion=complete_queries),
    ] = "",
    run: RunOption = Path(),
    format: Format = "table",
) -> None:
    """Run a named query, or list the named queries."""
    from pipeline import config
    from pipeline.commands import answers
    from pipeline.commands.sql import list_queries, print_rows

    if not name and format == "table":
        print("\n".join(f"{title:16} {sentence}" for title, sentence in list_queries()))
        return
    if not name:
        print_rows(["name", "about"], list_queries(), format, sys.stdout.buffer)
        return
    answers.print_named_query(config.load(run), name, format, sys.stdout.buffer)


@app.command("schema", epilog="Example: recap schema > run.schema.json")
def print_schema() -> None:
    """Print the JSON Schema of run.toml, for editors."""
    import json

    from pipeline.commands import schema

    print(json.dumps(schema.build_schema(), indent=2, ensure_ascii=False))


@app.command("report", epilog="Example: recap report --run runs/photos --images 200")
def write_report(
    run: RunOption = Path(),
    images: Annotated[int, typer.Option(help="Maximum number of samples to show.", min=1, max=1000)] = 60,
) -> None:
    """Write the run's numbers and samples to report.html.

    Prints its path. The file is self-contained: it fetches nothing, and its own script only filters the samples.
    """
    from pipeline import config
    from pipeline.audits import describe_certificate, describe_judges
    from pipeline.report import render

    loaded = config.load(run)
    judges, certificate = describe_judges(loaded), describe_certificate(loaded)
    print(render.write_report(loaded, num_images=images, judges=judges, certificate=certificate))


@app.command("serve", epilog="Example: recap serve judge --run runs/photos")
def serve_engine(
    engine: Annotated[
        str,
        typer.Argument(
            metavar="ENGINE", help="The name of a section [engines.ENGINE].", autocompletion=complete_engines
        ),
    ],
    run: RunOption = Path(),
    host: Annotated[
        str, typer.Option(help="The address to listen on; any but loopback requires an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 selects a free one.", min=0, max=65535)] = 0,
    ready_timeout: Annotated[float, typer.Option(help="Seconds to wait for the server to be ready.")] = 1800,
) -> None:
    """Start the vLLM server of an engine of run.toml.

    Engines with base_url = "endpoint" find it by themselves. It runs until it is interrupted.
    """
    from pipeline import config
    from pipeline.commands import serve

    serve.serve_engine(config.load(run), engine, host=host, port=port, ready_timeout=ready_timeout)


@app.command("verify", epilog="Example: recap verify --run runs/photos --shard 0/16")
def verify_run(run: RunOption = Path(), shard: ShardOption = "all") -> None:
    """Read every file of the run and name what is damaged.

    Prints a line for each damaged file, with the command that mends it, and exits with 1 if there is one. Missing and
    stale tables are not damage; `recap status` shows them.
    """
    from pipeline import config
    from pipeline.commands import verify

    num_damaged = 0
    for line in verify.verify_run(config.load(run), shards=shard):
        print(line, flush=True)
        num_damaged += 1
    raise typer.Exit(1 if num_damaged else 0)


@app.command("compare", epilog="Example: recap compare runs/old:dense runs/new:dense --samples 20 --format json")
def compare_runs(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A run's directory, or DIR:NAME for one of its caption passes.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Another run, or another pass of the same.")],
    samples: Annotated[
        int, typer.Option(help="Print this many images one by one, those whose scores differ most first.", min=0)
    ] = 0,
    format: Format = "table",
) -> None:
    """Compare two runs or passes: kept captions, lengths and scores.

    Images are joined by their sha256; of each, the best caption is compared: the chosen one, or a kept one.
    """
    from pipeline.commands import compare

    compare.compare_runs(a, b, num_samples=samples, format=format, out=sys.stdout.buffer)


@app.command("compact", epilog="Example: recap compact --run runs/photos")
def compact_tables(run: RunOption = Path()) -> None:
    """Copy the tables of many shards into few large files.

    Also answers the named queries, so that queries of the whole run become fast. Answers stay the same: a copy is used
    only while the tables in it are unchanged, and may be removed at any time.
    """
    from pipeline import config
    from pipeline.commands import compact

    for line in compact.compact_run(config.load(run)):
        print(line)


@app.command("push", epilog="Example: recap push somebody/photos --private --run runs/photos")
def push_export(
    target: Annotated[
        str,
        typer.Argument(
            metavar="REPO", help="A dataset of the Hub, USER/NAME, or a URL; without it, `url` in [export] of run.toml."
        ),
    ] = "",
    run: RunOption = Path(),
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
) -> None:
    """Upload the finished export to the Hub, or to a store such as S3.

    What is there already is skipped; an interrupted upload resumes. Prints where the export is.
    """
    from pipeline import config
    from pipeline.commands import push

    print(push.push_export(config.load(run), target, is_private=private))


@app.command("audit", epilog="Example: recap audit --labels labels-ada.json --run runs/photos")
def audit_run(
    run: RunOption = Path(),
    draw: Annotated[int | None, typer.Option(help="Draw this many captions and write audit.html.", min=2)] = None,
    labels: Annotated[
        list[Path] | None, typer.Option(help="A file of labels to add: saved by the page, or JSONL, or Parquet.")
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(help="Find the threshold above which this share of captions is acceptable.", min=0.01, max=0.999),
    ] = None,
    confidence: Annotated[float, typer.Option(help="The confidence of that threshold.", min=0.01, max=0.999)] = 0.9,
    score: Annotated[str | None, typer.Option(help="The score of that threshold: a name in [score].")] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws other captions.")] = 0,
) -> None:
    """Draw captions for people to label, and estimate the precision.

    The precision is the share of kept captions that are acceptable. Without options it prints the estimates, or, while
    there are no labels, writes a page with 200 captions. A larger --draw with the same seed keeps the captions of a
    smaller one.
    """
    from pipeline import audits, config

    audit, loaded = audits.load_command("audit"), config.load(run)
    for line in audit.run_command(
        loaded, draw=draw, labels=labels or (), precision=precision, confidence=confidence, score=score, seed=seed
    ):
        print(line)


app.add_typer(slurm, name="slurm")


@slurm.command("script", epilog="Example: recap slurm script caption --run runs/photos")
def print_scripts(stages: Stages = None, run: RunOption = Path(), stale: StaleOption = "stop") -> None:
    """Print the job scripts of everything that is missing."""
    from pipeline import config
    from pipeline.progress import say
    from pipeline.slurm import submit

    state, jobs = submit.select_jobs(config.load(run), stages or ["all"], stale=stale)
    scripts = list(submit.render_scripts(state, jobs))
    print("\n".join(scripts), end="")
    if not scripts:
        say("nothing is missing: there is no job to submit")


@slurm.command("submit", epilog="Example: recap slurm submit --run runs/photos")
def submit_jobs(stages: Stages = None, run: RunOption = Path(), stale: StaleOption = "stop") -> None:
    """Submit everything that is missing and not queued.

    Repeating the command is safe.
    """
    from pipeline import config
    from pipeline.progress import format_quantity, say
    from pipeline.slurm import submit

    state, jobs = submit.select_jobs(config.load(run), stages or ["all"], stale=stale)
    num_tasks = submit.submit_jobs(state, jobs)
    submitted = f"{format_quantity(num_tasks, 'task')} submitted"
    say(submitted if num_tasks else "nothing to submit: everything is done or queued")


def main() -> None:
    """The command `recap`."""
    try:
        words = [f" {word}" if is_sql_comment(word) else word for word in sys.argv[1:]]
        app(words, prog_name="recap", standalone_mode=True)
    except UserError as error:
        _print_error(error)
        sys.exit(2)
    except StoppedError:
        sys.exit(75)
    except BrokenPipeError:  # `recap sql ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _print_error(error)
        sys.exit(1)
    except Exception as error:  # memory may run out in any library
        trouble = find_trouble(error)
        if trouble is None:
            raise
        _print_error(trouble)
        sys.exit(1)


def _print_error(error: Exception) -> None:
    from pipeline.progress import escape_controls  # here, so that `recap --help` does not import the records

    print(f"recap: {escape_controls(str(error))}", file=sys.stderr)


def is_sql_comment(word: str) -> bool:
    """True if an argument is SQL that begins with a comment; an option's name has no white space."""
    return word.startswith("--") and any(map(str.isspace, word.partition("=")[0]))


def report_outcome(outcome: Outcome) -> None:
    from pipeline.progress import format_quantity, say

    failed = f", {len(outcome.failures)} failed" if outcome.failures else ""
    stopped = "; stopped, the same command resumes" if outcome.stopped and not outcome.limit else ""
    say(f"{format_quantity(outcome.done, 'shard table')} made, {outcome.skipped} already done{failed}{stopped}")
