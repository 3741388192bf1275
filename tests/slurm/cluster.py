"""A real Slurm cluster on this machine: slurmctld, and a slurmd a node in namespaces of its own.

Each node has an address, a host name, a PID space (killing its first process kills all of the node's, as a power cut
would), /dev/shm and /tmp/ray of its own; the disk is shared. Needs root and Debian's slurmctld, slurmd, slurm-client,
munge and iproute2; no systemd, no containers.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "setpriv")
LOCK = Path(tempfile.gettempdir()) / "megatron-dump-slurm.lock"
WAIT_LOCK_S, WAIT_UP_S = 900, 60
_DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL")  # even when the tests themselves are killed

CONF = """\
ClusterName=test
SlurmctldHost={host}({head})
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n/slurmd.pid
SlurmdSpoolDir={root}/%n/spool
StateSaveLocation={root}/state
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,requeue_delay=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
InactiveLimit=0
KillWait=5
JobRequeue=1
NodeName=DEFAULT CPUs=4 RealMemory=6000 State=UNKNOWN
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class ClusterError(RuntimeError):
    """The cluster did not come up, or a job did not get where it should; the message holds the logs' ends."""


def missing() -> str:
    """Why there can be no cluster here; "" if there can."""
    if os.geteuid() != 0:
        return "not root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge iproute2" if absent else ""


class Cluster:
    """`with Cluster(nodes=3) as cluster:` nodes node1 to node3 are idle; one cluster at a time on a machine."""

    def __init__(self, nodes: int = 3, plugstack: str = "") -> None:
        """plugstack: lines of plugstack.conf (SPANK plugins)."""
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.env = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}
        self._tag = f"md{os.getpid() % 100000}"
        self._plugstack = plugstack
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Cluster:
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, self.root, ignore_errors=True)
            undo.enter_context(_machine_lock())
            self._undo = undo
            self._network()
            self._configure()
            self._daemon("munged", ["munged", "--foreground", "--force", *self._munge_options()])
            self._daemon("slurmctld", ["slurmctld", "-c", "-D"])
            for node in self.nodes:
                undo.callback(self._end_node, node)
                self.start_node(node)
            self.wait_idle(self.nodes)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    # Nodes

    def start_node(self, node: str) -> None:
        hosts, out = self.root / "hosts", open(self.root / "log" / f"{node}.out", "ab")  # noqa: SIM115
        inside = (
            f"hostname {node}; mount --bind {hosts} /etc/hosts; mount -t tmpfs tmpfs /dev/shm; "
            f"mkdir -p /tmp/ray; mount -t tmpfs tmpfs /tmp/ray; exec slurmd -D -N {node}"
        )
        self._processes[node] = subprocess.Popen(
            [
                *_DIE_WITH_US,
                "nsenter",
                f"--net=/run/netns/{self._tag}{node}",
                "unshare",
                "--uts",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "bash",
                "-c",
                inside,
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=self.env,
            start_new_session=True,
        )
        out.close()

    def kill_node(self, node: str) -> None:
        """As a power cut: the kernel kills every process of the node."""
        first = _children(self._processes[node].pid)
        if not first:
            raise ClusterError(f"{node} is not running")
        os.kill(first[0], signal.SIGKILL)
        self._processes[node].wait(30)

    def revive(self, node: str) -> None:
        """Start it again if it was killed."""
        if self._processes[node].poll() is not None:
            self.start_node(node)

    def wait_idle(self, nodes: list[str], timeout_s: float = WAIT_UP_S) -> None:
        def idle() -> bool:
            listed = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout.split("\n")
            return {f"{node} idle" for node in nodes} <= set(listed)

        self.wait(idle, timeout_s, lambda: f"{nodes} not idle:\n{self.run('sinfo', '-N', check=False).stdout}")

    def processes(self, node: str, environment: str = "RANK=") -> dict[int, dict[str, str]]:
        """Processes of a node whose environment names `environment`, with it, by their PID on this machine."""
        init = _children(self._processes[node].pid)
        found = {}
        for entry in Path("/proc").iterdir() if init else ():
            with contextlib.suppress(OSError):  # ended meanwhile
                if os.readlink(entry / "ns/uts") == os.readlink(f"/proc/{init[0]}/ns/uts"):
                    words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                    if any(word.startswith(environment) for word in words):
                        found[int(entry.name)] = dict(word.partition("=")[::2] for word in words if "=" in word)
        return found

    # Jobs

    def run(self, *command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        env = {**self.env, **options.pop("env", {})}
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False, **options)
        if check and result.returncode:
            raise ClusterError(f"{' '.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
        return result

    def sbatch(self, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """The job's id."""
        return self.run("sbatch", "--parsable", *arguments, env=dict(env or {}), cwd=cwd).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job).stdout))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_job(self, job: str, *states: str, timeout_s: float = 180) -> str:
        """Until the job is, for a second, in one of the states.

        A requeued job is PENDING until the credentials of its last start have expired (cred_expire): started before, it
        fails.
        """

        def there() -> str | None:
            state = self.state(job)
            if state not in states:
                return None
            time.sleep(1)
            return state if self.state(job) == state else None

        return self.wait(there, timeout_s, lambda: f"job {job} is {self.state(job)}, not {' or '.join(states)}")

    def wait(self, condition: Callable[[], Any], timeout_s: float, why: Callable[[], str]) -> Any:
        end = time.monotonic() + timeout_s
        while not (result := condition()):
            if time.monotonic() > end:
                raise ClusterError(f"after {timeout_s} s {why()}\n{self._logs()}")
            time.sleep(0.2)
        return result

    # Its parts

    def _network(self) -> None:
        _remove_leftovers()
        self._net = net = _free_net()
        bridge = f"{self._tag}br"
        _ip(f"link add {bridge} type bridge")
        self._undo.callback(_ip, f"link del {bridge}")
        _ip(f"addr add {net}.1/24 dev {bridge}")
        _ip(f"link set {bridge} up")
        for i, node in enumerate(self.nodes):
            space, cable = f"{self._tag}{node}", f"{self._tag}v{i + 1}"
            _ip(f"netns add {space}")
            self._undo.callback(_ip, f"netns del {space}")
            _ip(f"link add {cable} type veth peer name eth0 netns {space}")
            _ip(f"link set {cable} master {bridge} up")
            _ip(f"-n {space} addr add {net}.{11 + i}/24 dev eth0")
            _ip(f"-n {space} link set eth0 up")
            _ip(f"-n {space} link set lo up")

    def _configure(self) -> None:
        for folder in ("state", "log", *(f"{node}/spool" for node in self.nodes)):
            (self.root / folder).mkdir(parents=True)
        addresses = [f"{self._net}.{11 + i}" for i in range(len(self.nodes))]
        hosts = ["127.0.0.1 localhost", f"{self._net}.1 head"]
        for node, address in zip(self.nodes, addresses, strict=True):
            hosts += [f"{address} {node}", f"::ffff:{address} {node}"]  # the second: c10d looks names up that way
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")
        nodes = [f"NodeName={n} NodeAddr={a}" for n, a in zip(self.nodes, addresses, strict=True)]
        (self.root / "slurm.conf").write_text(
            CONF.format(
                host=socket.gethostname(),
                head=f"{self._net}.1",
                root=self.root,
                nodes="\n".join(nodes),
                ctld_port=_free_port(),
                slurmd_port=_free_port(),
            )
        )
        if self._plugstack:
            (self.root / "plugstack.conf").write_text(self._plugstack)
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _munge_options(self) -> list[str]:
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        return [f"--{option}={self.root / name}" for option, name in files.items()]

    def _daemon(self, name: str, command: list[str]) -> None:
        with open(self.root / "log" / f"{name}.out", "ab") as out:
            process = subprocess.Popen(
                [*_DIE_WITH_US, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.env,
                start_new_session=True,
            )
        self._undo.callback(_end, process)
        self._processes[name] = process
        if name == "munged":
            ready = (self.root / "munge.sock").exists
            self.wait(ready, 20, lambda: "munged has no socket")

    def _end_node(self, node: str) -> None:
        process = self._processes.get(node)
        if process is not None and process.poll() is None:
            for child in _children(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            _end(process)

    def _logs(self) -> str:
        ends = []
        for log in sorted((self.root / "log").iterdir()):
            lines = log.read_text(errors="replace").splitlines()[-8:]
            ends += [f"--- {log.name}", *lines] if lines else []
        return "\n".join(ends)


@contextlib.contextmanager
def _machine_lock() -> Iterator[None]:
    with open(LOCK, "a") as file:
        end = time.monotonic() + WAIT_LOCK_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ClusterError(f"another cluster has held {LOCK} for {WAIT_LOCK_S} s") from None
                time.sleep(1)
        os.set_inheritable(file.fileno(), False)
        yield


def _ip(arguments: str) -> None:
    result = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True, check=False)
    if result.returncode:
        raise ClusterError(f"ip {arguments}: {result.stderr.strip()}")


def _remove_leftovers() -> None:
    """Networks of clusters whose tests were killed. We hold the lock: none of them is in use."""
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    for space in (name for name in spaces if re.fullmatch(r"md\d+node\d+", name)):
        _ip(f"netns del {space}")
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    for bridge in re.findall(r"\b(md\d+br):", links):
        _ip(f"link del {bridge}")


def _free_net() -> str:
    taken = subprocess.run(["ip", "-4", "-o", "addr"], capture_output=True, text=True, check=True).stdout
    return next(net for net in (f"10.{i}.{77}" for i in range(77, 250)) if f" {net}." not in taken)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def _children(pid: int) -> list[int]:
    result = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in result.stdout.split()]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
