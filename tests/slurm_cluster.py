"""A SLURM cluster of one node in a temporary folder, for tests on a machine without one. Needs root, no systemd."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "sinfo", "squeue", "scancel")

CONFIGURATION = """
ClusterName=tiny
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/s,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/log/slurmctld.pid
SlurmdPidFile={root}/log/slurmd.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
JobRequeue=1
KillWait=5
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here, or ''."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "only root can run this cluster"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """A context manager; ``environment`` makes sbatch and the others talk to it."""

    def __init__(self):
        # pytest's own folders are closed to others, and munge wants a way to its socket that is open to all.
        self.root = root = Path(tempfile.mkdtemp(prefix="slurm-"))
        root.chmod(0o755)
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        for name in ("munge", "state", "spool", "log"):
            (self.root / name).mkdir(parents=True)
        key = self.root / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        (self.root / "slurm.conf").write_text(CONFIGURATION.format(root=self.root, ports=_free_ports(2)))
        munge = self.root / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "-F", f"--socket={munge / 's'}", *files)
        self._start("slurmctld", "-D", "-f", self.root / "slurm.conf")
        self._start("slurmd", "-D", "-N", "localhost", "-f", self.root / "slurm.conf")
        try:
            self.until(lambda: self("sinfo", "-h", "-o", "%T") == "idle", 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, *command: object) -> None:
        log = open(self.root / "log" / f"{command[0]}.out", "wb")  # noqa: SIM115
        self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def __exit__(self, *_exception: object) -> None:
        subprocess.run(["scancel", "-u", "root"], env=self.environment, capture_output=True)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def __call__(self, *command: object, cwd: Path | None = None) -> str:
        """The output of a command of the cluster; '' if it fails."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True)
        return done.stdout.strip()

    def submit(self, *command: object, cwd: Path) -> str:
        """``sbatch --parsable ...``; the job's id."""
        line = ["sbatch", "--parsable", *command]
        done = subprocess.run(line, env=self.environment, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """``scontrol show job`` as a dict; of an array's first task."""
        fields = self("scontrol", "show", "job", "--oneliner", job).splitlines()
        return dict(field.split("=", 1) for field in fields[0].split() if "=" in field) if fields else {}

    def until(self, condition, seconds: float):
        """What ``condition()`` gives once it is true."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"waited {seconds} s; {self('squeue')}"
            time.sleep(0.2)
        return found

    def ended(self, job: str, seconds: float = 300) -> dict[str, str]:
        """The job once it runs no more and waits for nothing."""
        active = {"PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUED"}
        return self.until(lambda: (found := self.job(job)).get("JobState") not in (*active, None) and found, seconds)
