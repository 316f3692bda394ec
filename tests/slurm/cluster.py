"""A real Slurm on this machine: every node a network, a host name and an /etc/hosts of its own on a private bridge.

Nothing daemonizes: all daemons are children that end with the test process, however it ends. Nodes share process ids, /tmp and
/dev/shm. A node claims CPUs, memory and GPUs (null devices) that the machine has not.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_hpt.launch.children import Child, stop_all

INSTALL = Path(__file__).parents[1] / "install.sh"
SLURM = (
    "slurmctld slurmd srun slurmdbd munged mariadbd mariadb ip",
    *("slurmctld", "slurmd", "slurm-client", "slurmdbd", "munge", "mariadb-server-core", "mariadb-client-core", "iproute2"),
)
"""Commands, and the packages that have them."""
CPUS, MEMORY_MIB, GPUS = 16, 8192, 8
"""What a node claims."""
CTLD_PORT, DBD_PORT, DATABASE_PORT, SLURMD_PORT = 26800, 26801, 26802, 26810

SLURM_CONF = """\
ClusterName=hpt
SlurmctldHost={host}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again after 5 s instead of 120.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ctld_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,bf_continue,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=15
KillWait=10
BatchStartTimeout=10
MessageTimeout=20
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={address}
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
# Listen on the bridge alone; nodes may claim what the machine has not.
CommunicationParameters=NoCtldInAddrAny
SlurmdParameters=config_overrides
{nodes}
PartitionName=batch Nodes=ALL Default=YES DefaultTime=00:10:00 MaxTime=UNLIMITED State=UP
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr={address}
DbdPort={dbd_port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost={address}
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
CommunicationParameters=NoInAddrAny
"""


def unavailable() -> str | None:
    """Why this machine cannot bring up a cluster; None: it can, the packages are installed."""
    if os.geteuid() != 0:
        return "needs root"
    install = subprocess.run([INSTALL, *SLURM], capture_output=True, text=True, check=False)
    if install.returncode != 0:
        return f"Slurm is not to be had: {install.stderr.strip()}"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else f"no namespaces here: {probe.stderr.strip()}"


@dataclass
class Job:
    """A submitted job."""

    cluster: Cluster
    number: str
    folder: Path

    def show(self, key: str) -> str:
        """One field of ``scontrol show job``."""
        return re.search(rf"\b{key}=(\S+)", self.cluster.call("scontrol", "show", "job", self.number))[1]

    @property
    def state(self) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED`` …"""
        return self.show("JobState")

    @property
    def output(self) -> str:
        """What the batch script printed, all tries."""
        return "".join(path.read_text(errors="replace") for path in self.folder.rglob(f"*-{self.number}.out"))

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for a condition while the job has not failed."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.state not in {"FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}, f"{self.state}\n{self.output}"
            assert time.monotonic() < deadline, f"{self.state} after {seconds:.0f} s\n{self.output}"
            time.sleep(0.5)

    def end(self, seconds: float) -> str:
        """Wait until it has ended for good, and return its state."""
        deadline = time.monotonic() + seconds
        while (state := self.state) in {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING", "SUSPENDED"}:
            assert time.monotonic() < deadline, f"{state} after {seconds:.0f} s\n{self.output}"
            time.sleep(0.5)
        return state


@dataclass
class Cluster:
    """Controller, accounting and nodes n1, n2, …; `folder` must have a short name (unix sockets)."""

    folder: Path
    nodes: int
    _daemons: dict[str, Child] = field(default_factory=dict)

    @property
    def _tag(self) -> str:
        """Begins the names of everything that the kernel knows of; short, interfaces have 15 characters."""
        return f"hpt{os.getpid()}"

    @property
    def _network(self) -> str:
        """A /24 by process id, so that two test runs of one machine hardly ever meet."""
        return f"10.213.{os.getpid() % 250}"

    @property
    def _address(self) -> str:
        return f"{self._network}.254"

    @property
    def _conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def _tmp(self) -> Path:
        """Temporary files of jobs: as on sites whose Slurm removes them with the job."""
        return self.folder / "tmp"

    def names(self) -> list[str]:
        """All nodes."""
        return [f"n{index}" for index in range(1, self.nodes + 1)]

    # What tests do.

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a client of the cluster as on a login node."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        result = subprocess.run(
            command,
            cwd=cwd,
            env={**clean, "SLURM_CONF": str(self._conf), "TMPDIR": str(self._tmp), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, folder: Path, *arguments: str, **environment: str) -> Job:
        """``sbatch`` from a folder."""
        return Job(self, self.call("sbatch", "--parsable", *arguments, cwd=folder, **environment).strip(), folder)

    def processes(self, node: str) -> list[psutil.Process]:
        """What runs on a node, but Slurm itself."""
        listed = [int(pid) for pid in _run("ip", "netns", "pids", f"{self._tag}-{node}").split()]
        found = []
        for pid in listed:
            try:
                process = psutil.Process(pid)
                if process.name() not in {"slurmd", "slurmstepd"}:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def cut(self, node: str) -> None:
        """Pull a node's network cable."""
        _run("ip", "-n", f"{self._tag}-{node}", "link", "set", "eth0", "down")

    def mend(self, node: str) -> None:
        """Plug it in again, and end what a lost job has left there."""
        _run("ip", "-n", f"{self._tag}-{node}", "link", "set", "eth0", "up")
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        daemon = f"slurmd.{node}"
        self._daemons[daemon] = self._daemons[daemon].again()  # reports at once; the controller would ask minutes later
        self._until(lambda: self.call("sinfo", "-h", "-n", node, "-o", "%T").strip() == "idle", 60, node)

    # Coming and going.

    def start(self) -> None:
        """Bring everything up; returns when every node is idle."""
        remove_networks_of_the_dead()
        for name in ("log", "state", "spool", "dev", "mysql", "tmp"):
            (self.folder / name).mkdir(parents=True)
        for name in self.names():
            (self.folder / "spool" / name).mkdir()
        for index in range(GPUS):  # slurmd wants character devices
            os.mknod(self.folder / "dev" / f"nvidia{index}", 0o20666, os.makedev(1, 3))
        self._write_files()
        self._start_network()
        self._start_munge()
        self._start_accounting()
        self._daemon("slurmctld", self._among_names("slurmctld -D -i"))
        self._until(lambda: self.call("scontrol", "ping"), 15, "slurmctld")
        for name in self.names():
            inside = self._among_names(f"slurmd -D -N {name}", f"hostname {name}; ")
            self._daemon(f"slurmd.{name}", ["ip", "netns", "exec", f"{self._tag}-{name}", *inside])
        self._until(lambda: self.call("sinfo", "-h", "-N", "-t", "idle").count("\n") == self.nodes, 60, "a node")

    def stop(self) -> None:
        """End everything that belongs to it, by process id and by namespace, and remove its files."""
        if "slurmctld" in self._daemons:
            subprocess.run(
                ["scancel", "-u", "root"], env={**os.environ, "SLURM_CONF": str(self._conf)}, timeout=30, check=False
            )
            time.sleep(1)
        stop_all(list(reversed(self._daemons.values())))
        _remove_networks(self._tag)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_files(self) -> None:
        values = {
            "folder": self.folder,
            "host": socket.gethostname().split(".")[0],
            "address": self._address,
            "ctld_port": CTLD_PORT,
            "dbd_port": DBD_PORT,
            "database_port": DATABASE_PORT,
        }
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={self._network}.{index} Port={SLURMD_PORT} CPUs={CPUS} "
            f"RealMemory={MEMORY_MIB} Gres=gpu:h100:{GPUS} State=UNKNOWN"
            for index, name in enumerate(self.names(), 1)
        )
        hosts = [f"{self._network}.{index} {name}" for index, name in enumerate(self.names(), 1)]
        gres = f"NodeName=n[1-{self.nodes}] Name=gpu Type=h100 File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n"
        files = {
            "slurm.conf": SLURM_CONF.format(nodes=nodes, **values),
            "slurmdbd.conf": SLURMDBD_CONF.format(**values),
            "cgroup.conf": "CgroupPlugin=cgroup/v1\n",  # loads everywhere; nothing here uses it
            "gres.conf": gres,
            "plugstack.conf": "",  # shuts out that of /etc
            "hosts": "\n".join(["127.0.0.1 localhost", f"{self._address} {values['host']}", *hosts, ""]),
            # Names come from the file alone: torch looks addresses up, and DNS would time out.
            "nsswitch.conf": re.sub(r"(?m)^hosts:.*", "hosts: files", Path("/etc/nsswitch.conf").read_text(encoding="utf-8")),
        }
        for name, text in files.items():
            (self.folder / name).write_text(text)
        (self.folder / "slurmdbd.conf").chmod(0o600)

    def _among_names(self, command: str, before: str = "") -> list[str]:
        """A daemon that knows the nodes by name: those that may not listen everywhere listen where their host's name points."""
        bound = "".join(f"mount --bind {self.folder}/{name} /etc/{name}; " for name in ("hosts", "nsswitch.conf"))
        return ["unshare", "--uts", "--mount", "sh", "-ec", f"{before}{bound}exec {command}"]

    def _start_network(self) -> None:
        bridge = f"{self._tag}-br"
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self._address}/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for index, name in enumerate(self.names(), 1):
            space, cable = f"{self._tag}-{name}", f"{self._tag}v{index}"
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", cable, "master", bridge, "up")
            _run("ip", "-n", space, "addr", "add", f"{self._network}.{index}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _run("ip", "-n", space, "link", "set", device, "up")

    def _start_munge(self) -> None:
        key, munge = self.folder / "munge.key", f"{self.folder}/munge"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._daemon(
            "munged",
            [
                *("munged", "--foreground", f"--key-file={key}", f"--socket={munge}.socket", f"--pid-file={munge}.pid"),
                *(f"--log-file={self.folder}/log/munged.log", f"--seed-file={munge}.seed"),
            ],
        )
        self._until(lambda: _run("munge", "-S", f"{munge}.socket", "-n"), 10, "munged")

    def _start_accounting(self) -> None:
        data, sock = self.folder / "mysql", str(self.folder / "mysql.socket")
        _run(
            *("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"),
            "--auth-root-authentication-method=normal",
        )
        self._daemon(
            "mariadbd",
            [
                *("mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={sock}"),
                *(f"--bind-address={self._address}", f"--port={DATABASE_PORT}", "--skip-name-resolve"),
                *("--innodb-buffer-pool-size=64M", "--innodb-log-file-size=32M", f"--pid-file={self.folder}/mariadbd.pid"),
            ],
        )
        user = "create user 'slurm'@'%' identified by 'slurm'; grant all on slurm_acct.* to 'slurm'@'%';"  # on the bridge alone
        self._until(lambda: _run("mariadb", "--no-defaults", "-S", sock, "-uroot", "-e", user) or True, 20, "mariadbd")
        self._daemon("slurmdbd", self._among_names("slurmdbd -D"))
        self._until(lambda: self.call("sacctmgr", "-i", "add", "cluster", "hpt"), 20, "slurmdbd")
        self.call("sacctmgr", "-i", "add", "account", "hpt", "Cluster=hpt")
        self.call("sacctmgr", "-i", "add", "user", "root", "Account=hpt")

    def _daemon(self, name: str, command: Sequence[str]) -> None:
        environment = {**os.environ, "SLURM_CONF": str(self._conf)}
        self._daemons[name] = Child.start(name, command, self.folder / "log" / f"{name}.console", environment)

    def _until(self, condition: Callable[[], object], seconds: float, late: str) -> None:
        deadline, said = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except (AssertionError, subprocess.TimeoutExpired) as error:
                said = str(error)
            time.sleep(0.2)
        raise AssertionError(f"{late} is late: {said}\n{self._logs()}")

    def _logs(self) -> str:
        logs = sorted((self.folder / "log").iterdir())
        return "\n".join(f"== {path.name}\n" + "\n".join(path.read_text().splitlines()[-5:]) for path in logs)


def remove_networks_of_the_dead() -> None:
    """Remove what test processes that were killed have left, with everything that still runs in it."""
    for pid in set(re.findall(r"(?m)^hpt(\d+)-", _run("ip", "netns", "list"))):
        if not psutil.pid_exists(int(pid)):
            _remove_networks(f"hpt{pid}")


def _remove_networks(tag: str) -> None:
    """Namespaces with everything that still runs in them, and the bridge."""
    for name in re.findall(rf"(?m)^{tag}-n\d+", _run("ip", "netns", "list")):
        for pid in _run("ip", "netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _run("ip", "netns", "del", name)
    if f"{tag}-br" in _run("ip", "-o", "link"):
        _run("ip", "link", "del", f"{tag}-br")


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
    return result.stdout
