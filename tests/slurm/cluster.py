"""A real SLURM on this machine, for tests: munged, slurmctld and slurmd of its own, in a temporary folder."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SECONDS = 60.0  # for a daemon to answer: they take one or two

# Two nodes, both this machine: the first has its name, which torchrun must be able to look up.
# Two partitions: a job in `urgent` takes the node from one in `batch`, which is queued again.
# cred_expire: a job that is queued again is held off for as long as its credential lives, 120 s by default.
CONFIGURATION = """
ClusterName=lopdtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
KillWait=5
OverTimeLimit=0
JobRequeue=1
MinJobAge=3600
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} RealMemory={memory} State=UNKNOWN
NodeName={host}-b NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} RealMemory={memory} State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def installed() -> bool:
    """Whether a SLURM can be started here: its programs are there, and this is root, as slurmd must be."""
    return os.geteuid() == 0 and all(_program(name) for name in PROGRAMS)


@dataclass
class Slurm:
    """The daemons and how to ask them. `environment` makes SLURM's commands talk to them."""

    root: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.root / "slurm.conf")}

    def start(self) -> None:
        host = socket.gethostname().split(".")[0]
        nodes = (host, f"{host}-b")
        for name in ("state", *(f"spool-{node}" for node in nodes)):
            (self.root / name).mkdir()
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        (self.root / "slurm.conf").write_text(
            CONFIGURATION.format(
                root=self.root,
                host=host,
                controller_port=_free_port(),
                ports=[_free_port(), _free_port()],
                memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 * 9 // 10,
            )
        )
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.root}/munge.socket",
            f"--pid-file={self.root}/munged.pid", f"--log-file={self.root}/munged.log",
            f"--seed-file={self.root}/munged.seed",
        )  # fmt: skip
        self.wait_for("munge", lambda: (self.root / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        for node in nodes:
            self._daemon("slurmd", "-D", "-N", node)
        self.wait_for("idle nodes", lambda: self._node_states() == {"idle"})

    def stop(self) -> None:
        self.ask("scancel", "--user=root", check=False)
        try:  # a daemon that is gone ends no job: its processes would go on
            self.wait_for("jobs to end", lambda: not self.ask("squeue", "--noheader", check=False))
        finally:
            for process in reversed(self.processes):
                process.terminate()
            for process in self.processes:
                process.wait(SECONDS)

    def ask(self, *command: str, check: bool = True) -> str:
        """What a SLURM command prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=SECONDS)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """A job's state, such as RUNNING; the parts of an array job that differ are joined by a comma."""
        shown = self.ask("scontrol", "--oneliner", "show", "job", job)
        return ",".join(sorted({part.split("JobState=")[1].split()[0] for part in shown.splitlines()}))

    def wait_for(self, what: str, reached: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Poll until `reached`. AssertionError naming `what`, with the controller's last lines."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}\n{self._last_lines()}"
            time.sleep(0.05)

    def _node_states(self) -> set[str]:
        return set(self.ask("sinfo", "--noheader", "--format=%t", check=False).split())

    def _last_lines(self) -> str:
        log = self.root / "slurmctld.log"
        return "\n".join(log.read_text().splitlines()[-20:]) if log.exists() else ""

    def _daemon(self, name: str, *arguments: str) -> None:
        log = (self.root / f"{name}.out").open("ab")
        program = _program(name)
        assert program
        self.processes.append(
            subprocess.Popen([program, *arguments], env=self.environment, stdout=log, stderr=log)
        )


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
