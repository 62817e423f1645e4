"""A real Slurm on 127.0.0.1: munge, one controller and one node, with all files in a scratch directory.

It needs root and Debian's slurm-wlm and munge. It ends only the processes that it started.

    python -m tests.slurm.cluster FOLDER        # until Ctrl-C or SIGTERM; set SLURM_CONF=FOLDER/slurm.conf
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

CONF = """\
ClusterName=recap
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
MaxArraySize={max_array_size}
MinJobAge=300
KillWait=10
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def start_cluster(folder: Path, *, max_array_size: int = 1001, cpus: int = 4) -> Iterator[dict[str, str]]:
    """A running cluster; yields the environment that Slurm's commands need."""
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(parents=True)
    ports = find_free_ports(2)
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(
            host=platform.node(),
            port=ports[0],
            node_port=ports[1],
            folder=folder,
            max_array_size=max_array_size,
            cpus=cpus,
        )
    )
    env = {**os.environ, "SLURM_CONF": str(conf)}
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    munge = folder / "munge"
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}/socket"]
    munged += [f"--{name}-file={munge}/{name}" for name in ("log", "pid", "seed")]
    with ExitStack() as stack:
        for command in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
            stack.enter_context(start_daemon(command, env, folder / f"{command[0]}.out"))
            time.sleep(0.5)
        wait_for_node(env, folder)
        try:
            yield env
        finally:
            subprocess.run(["scancel", "--user=root"], env=env, capture_output=True, check=False)
            wait_until_empty(env)


@contextmanager
def start_daemon(command: Sequence[str], env: dict[str, str], log: Path) -> Iterator[None]:
    program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        raise RuntimeError(f"{command[0]} is not installed: apt-get install slurm-wlm munge")
    with open(log, "wb") as out:
        process = subprocess.Popen([program, *command[1:]], env=env, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def find_free_ports(num: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for_node(env: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        seen = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True, check=False)
        if seen.stdout.strip() == "idle":
            return
        time.sleep(0.3)
    logs = "\n".join(f"{path.name}:\n{path.read_text()[-1500:]}" for path in sorted(folder.glob("*.[lo][ou][gt]")))
    raise RuntimeError(f"the node did not come up (sinfo: {seen.stdout!r} {seen.stderr!r})\n{logs}")


def wait_until_empty(env: dict[str, str]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not subprocess.run(["squeue", "-h"], env=env, capture_output=True, text=True, check=False).stdout.strip():
            return
        time.sleep(0.3)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with start_cluster(Path(sys.argv[1]).absolute()) as environment, suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={environment['SLURM_CONF']}", flush=True)
        signal.pause()
