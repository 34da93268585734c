"""A real SLURM of two emulated nodes on this machine, without systemd, cgroups or accounting.

Started and stopped by pid. Everything listens on loopback. Installed from Debian's packages when missing, as root.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

NODES = ("n1", "n2")
_PACKAGES = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}

#: Accounting is off: this answers what submitit asks sacct, from what slurmctld remembers.
_SACCT = r"""#!/bin/sh
# sacct -o JobID,State,NodeList --parsable2 -j ID [-j ID ...]
echo "JobID|State|NodeList"
while [ $# -gt 0 ]; do
  if [ "$1" = -j ]; then
    shift
    scontrol show job -o "$1" 2>/dev/null | sed -nE \
      -e 's/^JobId=([0-9]+) ArrayJobId=([0-9]+) ArrayTaskId=([0-9]+) .*/& @\2_\3/' \
      -e '/ @/!s/^JobId=([0-9]+) .*/& @\1/' \
      -e 's/.* JobState=([A-Z_]+) .* NodeList=([^ ]*) .* @([0-9_]+)$/\3|\1|\2/p'
  fi
  shift
done
"""

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={munge}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldParameters=preempt_send_user_signal
SlurmctldPort={port}
SlurmctldPidFile={base}/slurmctld.pid
SlurmctldLogFile={base}/slurmctld.log
StateSaveLocation={base}/state
SlurmdPidFile={base}/slurmd.%n.pid
SlurmdSpoolDir={base}/spool.%n
SlurmdLogFile={base}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
MinJobAge=3600
SlurmdTimeout=30
BatchStartTimeout=20
MessageTimeout=20
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF
"""


@contextmanager
def running_cluster(base: Path) -> Iterator[Mapping[str, str]]:
    """Start SLURM, yield the environment of its commands, and stop what was started.

    Args:
        base: empty folder for configuration, logs and state.
    """
    with (Path(tempfile.gettempdir()) / "villa_slurm.lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        _install()
        _name_nodes()
    base.chmod(0o755)
    (base / "state").mkdir()
    (base / "bin").mkdir()
    (base / "bin" / "sacct").write_text(_SACCT)
    (base / "bin" / "sacct").chmod(0o755)
    conf = base / "slurm.conf"
    environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": f"{base / 'bin'}:{os.environ['PATH']}"}
    started: list[Path] = []
    with _munge() as munge:
        conf.write_text(_configuration(base, munge))
        try:
            started.append(_daemon(["slurmctld", "-f", str(conf)], base / "slurmctld.pid"))
            for name in NODES:
                started.append(_daemon(["slurmd", "-f", str(conf), "-N", name], base / f"slurmd.{name}.pid"))
            _wait(lambda: _up(environment) == len(NODES), 600, "the nodes to come up")
            yield environment
        finally:
            if (base / "slurmctld.pid") in started:
                _cancel_all(environment)
            for path in reversed(started):
                stop(path)


def stop(pid_file: Path, number: int = signal.SIGTERM) -> None:
    """End the process that a pid file names, and wait until it is gone."""
    pid = int(pid_file.read_text())
    os.kill(pid, number)
    try:
        _wait(lambda: not _alive(pid), 10, f"process {pid} to end")
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
    pid_file.unlink(missing_ok=True)


def ranks(job: str) -> dict[int, int]:
    """Process ids of a job's ranks, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            pairs = (item.partition("=") for item in (process / "environ").read_text(errors="replace").split("\0"))
            given = {name: value for name, _, value in pairs}
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        if given.get("SLURM_JOB_ID") == job and "submitit.core._submit" in command and "srun" not in command:
            rank, pid = int(given["SLURM_PROCID"]), int(process.name)
            found[rank] = min(found.get(rank, pid), pid)  # the first one: its data workers have its environment
    return found


def kill_node(environment: Mapping[str, str], node: str, process: int) -> None:
    """Let a node fail: its daemon, and one process of a job there with the daemon of its step, end without a word."""
    status = (Path("/proc") / str(process) / "status").read_text()
    step = int(status.partition("PPid:")[2].split()[0])
    stop(Path(environment["SLURM_CONF"]).parent / f"slurmd.{node}.pid", signal.SIGKILL)
    for pid in (step, process):
        os.kill(pid, signal.SIGKILL)


def start_node(environment: Mapping[str, str], node: str) -> None:
    """Bring a node back whose daemon has ended."""
    conf = Path(environment["SLURM_CONF"])
    _daemon(["slurmd", "-f", str(conf), "-N", node], conf.parent / f"slurmd.{node}.pid")


def _install() -> None:
    missing = sorted({package for program, package in _PACKAGES.items() if shutil.which(program) is None})
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment, stdout=subprocess.DEVNULL)
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def _name_nodes() -> None:
    """Let the nodes' names resolve: the first one's is the address of the processes' meeting point."""
    for name in (*NODES, socket.gethostname().partition(".")[0]):
        try:
            socket.gethostbyname(name)
        except OSError:
            with Path("/etc/hosts").open("a") as hosts:
                hosts.write(f"127.0.0.1 {name}\n")


def _configuration(base: Path, munge: Path) -> str:
    host, ports = socket.gethostname().partition(".")[0], _free_ports(1 + len(NODES))
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=8000 State=UNKNOWN"
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    return _CONF.format(host=host, port=ports[0], base=base, nodes="\n".join(nodes), munge=munge)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def _munge() -> Iterator[Path]:
    """A munged of this SLURM's own; yields its socket. It trusts no folder that others could change, as pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="munge"))
    end, key, pid_file = (folder / name for name in ("socket", "key", "pid"))
    key.touch(0o400)
    key.write_bytes(os.urandom(128))
    for path in (folder, key):
        shutil.chown(path, "munge", "munge")
    folder.chmod(0o755)
    files = {"socket": end, "key-file": key, "pid-file": pid_file, "log-file": folder / "log", "seed-file": "seed"}
    options = [f"--{name}={folder / path}" for name, path in files.items()]

    def answers() -> bool:
        command = f"munge -S {end} -n | unmunge -S {end}"
        return subprocess.run(command, shell=True, capture_output=True, check=False).returncode == 0

    subprocess.run(["runuser", "-u", "munge", "--", "munged", *options], check=True)
    try:
        _wait(answers, 120, "munged to answer")
        yield end
    finally:
        stop(pid_file)
        shutil.rmtree(folder)


def _daemon(command: list[str], pid_file: Path) -> Path:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    _wait(lambda: pid_file.exists() and bool(pid_file.read_text().strip()), 120, f"{command[0]} to start")
    return pid_file


def _up(environment: Mapping[str, str]) -> int:
    """Number of nodes that can be used."""
    found = subprocess.run(
        ["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], capture_output=True, text=True, env=environment, check=False
    )
    return sum(state in ("idle", "mixed", "allocated", "completing") for state in found.stdout.split())


def _cancel_all(environment: Mapping[str, str]) -> None:
    """End all jobs first: their steps would outlive the daemons."""
    subprocess.run(["scancel", "--user=root"], env=environment, check=False)

    def empty() -> bool:
        return not subprocess.run(["squeue", "-h"], capture_output=True, env=environment, check=False).stdout.strip()

    try:
        _wait(empty, 20, "jobs to end")
    except TimeoutError:
        return


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return "\nState:\tZ" not in status


def _wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)
