"""`recap check`: each planted mistake is one line, and `recap run` does not begin with one."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import socket
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pipeline.engines import _inspection
from pipeline.records import Planned
from pipeline.storage.tables import Provenance, write_rows
from tests.support.faults import Faulty
from tests.support.runs import begin, corpus, picture, recap, sections, write
from tests.support.serving import serve_folder

pytestmark = pytest.mark.slow

SCONTROL = """#!/bin/sh
echo "PartitionName=gpu Default=YES State=UP MaxTime=04:00:00 MaxCPUsPerNode=8 TotalCPUs=8 TotalNodes=1"
"""


class World:
    """A sound run on the echo engine, for a mistake to be planted in."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        self.folder, self.monkeypatch, self.stack = folder, monkeypatch, stack
        self.photos = corpus(folder / "photos", ["jpg", "png", "webp"] * 3)
        self.run = begin(folder / "run", sections(self.photos))

    def use(self, engine: dict[str, Any], **changes: dict[str, Any]) -> None:
        write(self.run, {**sections(self.photos, **changes), "engines.captioner": engine})

    def use_server(self, url: str, **keys: Any) -> None:
        self.use({"kind": "openai", "model": "echo", "base_url": url, "give_up_after": 2.0, **keys})

    def save_model(self, **values: Any) -> Path:
        folder = self.run / "models" / "m"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "x", **values}))
        (folder / "model.safetensors").touch()
        return folder

    def write_endpoint(self, text: str) -> None:
        (self.run / "endpoints").mkdir()
        (self.run / "endpoints" / "captioner.json").write_text(text)
        self.use_server("endpoint")


class Locked(Faulty):
    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "no"}}, status=401)


def find_closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def omit_model(world: World) -> None:
    world.use({"kind": "transformers", "model": "models/m/missing"})


def omit_weights(world: World) -> None:
    (world.save_model(vision_config={}) / "model.safetensors").unlink()
    world.use({"kind": "transformers", "model": "m"})


def name_text_model(world: World) -> None:
    world.save_model(num_attention_heads=4)
    world.use({"kind": "transformers", "model": "m"})


def shorten_context(world: World) -> None:
    world.save_model(vision_config={}, text_config={"max_position_embeddings": 128})
    world.use({"kind": "transformers", "model": "m"})


def stop_server(world: World) -> None:
    world.use_server(f"http://127.0.0.1:{find_closed_port()}/v1")


def mistake_port(world: World) -> None:
    world.use_server(f"{world.stack.enter_context(serve_folder(world.folder))}/v1")


def serve_another_model(world: World) -> None:
    world.use_server(world.stack.enter_context(Faulty()).url, model="another")


def serve_short_context(world: World) -> None:
    class Short(Faulty):
        async def _models(self, _: web.Request) -> web.Response:
            return web.json_response({"data": [{"id": "echo", "max_model_len": 64}]})

    world.use_server(world.stack.enter_context(Short()).url)


def refuse_pictures(world: World) -> None:
    server = world.stack.enter_context(Faulty())
    server.status = 400
    world.use_server(server.url)


def mistake_key(world: World) -> None:
    world.monkeypatch.setenv("SOME_KEY", "sesame-1234")
    world.use_server(world.stack.enter_context(Locked()).url, api_key_env="SOME_KEY")


def omit_key(world: World) -> None:
    world.use_server("http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY")


def uninstall(world: World) -> None:
    world.monkeypatch.setattr(_inspection, "find_spec", lambda module: None)
    world.use_server("http://127.0.0.1:1/v1")


def cut_endpoint(world: World) -> None:
    world.write_endpoint('{"base_url": "http://127')


def omit_endpoint(world: World) -> None:
    world.use_server("endpoint")


def kill_server(world: World) -> None:
    gone = {"base_url": "http://127.0.0.1:1/v1", "host": platform.node(), "pid": 2**22 + 1}
    world.write_endpoint(json.dumps(gone))


def fill_disk(world: World) -> None:
    full = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    world.monkeypatch.setattr(shutil, "disk_usage", lambda _: full)


def limit_handles(world: World) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    world.stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))


def lose_corpus(world: World) -> None:
    world.photos.rename(world.folder / "moved")


def empty_plan(world: World) -> None:
    provenance = Provenance(stage="plan", name="", version=1, slice={}, inputs={})
    write_rows(world.run / "plan.parquet", Planned, [], provenance)


def change_shard_size(world: World) -> None:
    world.use({"kind": "echo"}, source={"shard_size": 3})


def damage_plan(world: World) -> None:
    (world.run / "plan.parquet").write_bytes(b"PAR1")


def mistype_recipe(world: World) -> None:
    (world.run / "recipes").mkdir()
    (world.run / "recipes" / "mine.toml").write_text('prompt = "Describe it."\nprompts = 1\n')
    world.use({"kind": "echo"}, caption__dense={"recipe": "mine"})


def mistype_key(world: World) -> None:
    world.use({"kind": "echo", "texts": "x"})


def mistype_tokenizer(world: World) -> None:
    world.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    world.use({"kind": "echo"}, export={"tokenizer": "openai/no-such-clip", "max_tokens": 77})


def silence_hub(world: World) -> None:
    """A firewall that drops packets: a socket that listens and never answers."""
    listening = world.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    world.monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
    world.use({"kind": "echo"}, export={"tokenizer": "openai/silent-clip", "max_tokens": 77})


def lock_target(world: World) -> None:
    (world.folder / "file").write_text("")
    world.use({"kind": "echo"}, export={"url": f"file://{world.folder}/file/below"})


def lengthen_prefix(world: World) -> None:
    keys = {"tokenizer": "scenes-captioner", "max_tokens": 9, "prefix": {"dense": "There is a red star. " * 9}}
    world.use({"kind": "echo"}, export=keys)


def mistype_store(world: World) -> None:
    world.use({"kind": "echo"}, export={"url": "s4://bucket/name"})


def mistype_repository(world: World) -> None:
    world.use({"kind": "echo"}, export={"url": "hf://datasets/one/two/three"})


def ask_for_too_long(world: World) -> None:
    programs = world.folder / "bin"
    programs.mkdir()
    for name in ("scontrol", "squeue"):
        (programs / name).write_text(SCONTROL)
        (programs / name).chmod(0o755)
    world.monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    world.use({"kind": "echo"}, slurm={"partition": "gpu", "time": "1-00:00:00"})


MISTAKES: dict[Callable[[World], None], str] = {
    omit_model: r"engines\.captioner: model 'models/m/missing': is neither a directory",
    omit_weights: r"engines\.captioner: model '.*m': has no weights",
    name_text_model: r"engines\.captioner: m is there .* takes no images, and caption:dense shows it some",
    shorten_context: r"engines\.captioner: its context of 128 tokens .* caption:dense .*max_tokens",
    stop_server: r"engines\.captioner: http.* does not answer: .*refused.*start its server",
    mistake_port: r"engines\.captioner: base_url: http.*/models answers 404; is this the server",
    serve_another_model: r"engines\.captioner: model: http.* does not have 'another'; it has echo",
    serve_short_context: r"engines\.captioner: its context of 64 tokens",
    refuse_pictures: r"caption:dense: all 4 rows .* fail, e\.g\. error: http.* answered 400",
    mistake_key: r"engines\.captioner: api_key_env: http.* answers 401: it rejects the key in SOME_KEY",
    omit_key: r"engines\.captioner: api_key_env: the environment has no NO_SUCH_KEY",
    uninstall: r"engines\.captioner: kind 'openai': pip install",
    cut_endpoint: r"engines\.captioner: .*captioner\.json is damaged; remove it and start the server",
    omit_endpoint: r"engines\.captioner: no server is running: .*captioner\.json does not exist; start",
    kill_server: r"engines\.captioner: the server of .*captioner\.json has ended; start",
    fill_disk: r"run: the disk has 1\.0 MB left; free some",
    limit_handles: r"open files: 200 may be open, and 256 may be needed; run `ulimit -n 256`",
    lose_corpus: r"source: cannot be read: .*No such file.*are its disks mounted",
    empty_plan: r"source: plan\.parquet holds no images; correct the source",
    change_shard_size: r"run\.toml: source\.shard_size = 3 has no effect: .*made with 10, .*set it back to 10",
    damage_plan: r"run\.toml: .*plan\.parquet is damaged",
    mistype_recipe: r"run\.toml: recipes/mine\.toml: prompts: unknown key; did you mean 'prompt'",
    mistype_key: r"run\.toml: .*engines\.captioner\.texts: unknown key; did you mean 'text'",
    mistype_tokenizer: r"export: .*export\.tokenizer: 'openai/no-such-clip' is not a folder with a tokenizer\.json",
    silence_hub: r"export: no answer within 10 s; is the network reachable from here",
    lock_target: r"export\.url: .*file is no folder that may be written to",
    lengthen_prefix: r"export\.prefix\.dense: has \d+ tokens, and max_tokens = 9 leaves none for the text",
    mistype_store: r"export\.url: url: 's4://bucket/name' cannot be opened: Protocol not known",
    mistype_repository: r"export\.url: 'one/two/three' is not a repository of the Hub",
    ask_for_too_long: r"slurm\.time: 1-00:00:00 is longer than gpu allows, MaxTime=04:00:00",
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, monkeypatch, stack)


@pytest.mark.parametrize("plant", MISTAKES, ids=lambda plant: plant.__name__)
def test_a_planted_mistake_is_found_in_one_line(plant: Callable[[World], None], world: World) -> None:
    plant(world)
    done = recap("check", "--run", world.run, check=False)
    wrong = [line for line in done.stdout.splitlines() if not line.startswith("fine ")]
    assert (done.returncode, len(wrong)) == (2, 1), done.stdout
    assert re.search(MISTAKES[plant], wrong[0]), wrong[0]
    assert "sesame" not in done.stdout + done.stderr


def test_a_sound_run_is_fine_and_nothing_is_written(world: World) -> None:
    before = sorted(world.run.rglob("*"))
    done = recap("check", "--run", world.run)
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"fine"}
    assert "caption:dense: 4 rows of 4 random images" in done.stdout
    assert sorted(world.run.rglob("*")) == before


def test_a_run_with_a_mistake_does_not_begin_without_no_check(world: World) -> None:
    name_text_model(world)
    done = recap("run", "all", "--run", world.run, check=False)
    assert (done.returncode, "takes no images" in done.stderr) == (2, True)
    assert not (world.run / "image").exists()
    assert recap("run", "ingest", "--no-check", "--run", world.run).returncode == 0


def test_a_run_says_that_a_server_is_not_there_and_waits_for_it(world: World) -> None:
    stop_server(world)
    done = recap("run", "all", "--run", world.run, check=False)
    assert (done.returncode, "does not answer" in done.stderr) == (1, True)
    assert "gave up after" in done.stderr


def test_finished_passes_are_not_checked(world: World) -> None:
    recap("run", "all", "--run", world.run)
    lose_corpus(world)
    assert recap("run", "all", "--run", world.run).returncode == 0


@pytest.mark.parametrize(
    ("names", "warnings"), [(("a.txt", "b.jpg"), 0), (("a.txt",), 1)], ids=["an image comes later", "there is no image"]
)
def test_a_small_corpus_without_an_image_at_its_beginning_is_not_refused(
    tmp_path: Path, names: tuple[str, ...], warnings: int
) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "00000.tar", "w") as tar:
        for name in names:
            data = picture(1) if name.endswith(".jpg") else b"words"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    run = begin(tmp_path / "run", sections(tmp_path / "tars", source={"kind": "webdataset"}))
    done = recap("run", "ingest", "--run", run)
    assert done.stderr.count("none of 1 random images can be read") == warnings
