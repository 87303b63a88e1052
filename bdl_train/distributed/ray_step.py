"""One Slurm step is one private Ray cluster: `srun python -m bdl_train.distributed.ray_step RUN`, once on each node.

Rank 0 starts the head and the driver, `bdl train resume=RUN cluster=ray_cluster`, and ends with the driver's status;
the others join. What Ray's own launcher for Slurm (`ray symmetric-run`, 2.60) lacks: several jobs of a user can share a
node (own ports, own token, own processes only), resources are those of the allocation, Slurm's signals do not reach
Ray's daemons, nodes may join late, and the status is not 0 when Ray did not start.
"""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdl_train.distributed.driver_command import driver_command
from bdl_train.errors import Exit, RunFailedError, UsageError, guarded
from bdl_train.runs import KEEP_STOP, RunDir

START_S = 180.0
"""For the head to start, and for the others to find it."""
LOST_S = 20.0
"""That a driver may outlive the Ray under it."""
LONGEST_FOLDER = 45
"""Characters: socket paths end at 107 bytes, and Ray adds 62."""
PORTS = 500
"""Of one Ray node; blocks lie between 20000 and 60000."""
HEALTH = {
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
    "health_check_timeout_ms": 2000,
    "health_check_initial_delay_ms": 0,
}
DEAF_TO = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave this task.

    Attributes:
        job: Its number, and how often it was started before, `1234-0`.
        rank: Of this node.
        node: Slurm's name for it.
        memory_mib: None = not limited.
    """

    job: str
    rank: int
    node: str
    cpus: int
    gpus: int
    memory_mib: int | None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Allocation":
        """Read it from the variables that srun sets.

        Raises:
            UsageError: this is no task of a Slurm step.
        """
        try:
            number, rank = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_PROCID"])
        except (KeyError, ValueError) as error:
            raise UsageError("ray_step runs as a step of a Slurm job: see slurm/ray.sbatch.") from error
        cpus = int(environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE") or 1)
        memory = environment.get("SLURM_MEM_PER_NODE")
        per_cpu = environment.get("SLURM_MEM_PER_CPU")
        visible = [one for one in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        return cls(
            job=f"{number}-{environment.get('SLURM_RESTART_COUNT', '0')}",
            rank=rank,
            node=environment.get("SLURMD_NODENAME", socket.gethostname()),
            cpus=cpus,
            gpus=len(visible) if visible else int(environment.get("SLURM_GPUS_ON_NODE") or 0),
            # --mem=0 means all of the node.
            memory_mib=int(memory or 0) or int(per_cpu or 0) * cpus or None,
        )


def without_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What Ray's daemons and workers inherit.

    With SLURM_PROCID=1 in it, Lightning takes a member on the second node for rank 1 and writes nothing; on machines of
    NVIDIA, ROCR_VISIBLE_DEVICES, which Slurm sets for every GPU, would confuse Ray.
    """
    foreign = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMIX_", "SBATCH_")
    kept = {name: value for name, value in environment.items() if not name.startswith(foreign)}
    for name in ("RAY_ADDRESS", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"):
        kept.pop(name, None)
    return kept


def address_of(node: str) -> str:
    """The address at which the other nodes reach this one: Slurm's own NodeAddr, else what its name resolves to."""
    try:
        said = subprocess.run(
            ["scontrol", "--oneliner", "show", "node", node], capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    named = [word.partition("=")[2] for word in said.split() if word.startswith("NodeAddr=")]
    for host in (*named, node, node.partition(".")[0], socket.gethostname()):
        try:
            return socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0]  # pyright: ignore[reportReturnType]
        except OSError:
            continue
    raise RunFailedError(f"The node {node} has no address that can be found.")


def free_ports(allocation: Allocation, address: str) -> int:
    """The first port of a block that nobody on this machine uses, by the job's number where that is free."""
    blocks = (60000 - 20000) // PORTS
    first = int(allocation.job.partition("-")[0]) * 7 + allocation.rank
    for block in range(blocks):
        base = 20000 + (first + block) % blocks * PORTS
        try:
            for port in range(base, base + 9):
                with socket.socket() as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    one.bind(("", port))
            return base
        except OSError:
            continue
    raise RunFailedError(
        f"No free block of {PORTS} ports between 20000 and 60000 on {allocation.node} ({address})."
    )


def start_command(
    allocation: Allocation, address: str, base: int, folder: Path, head: str | None
) -> list[str]:
    """`ray start` for the head (`head` is None) or for a node that joins it."""
    ports = {
        "object-manager-port": base + 3, "node-manager-port": base + 4, "dashboard-agent-listen-port": base + 5,
        "dashboard-agent-grpc-port": base + 6, "runtime-env-agent-port": base + 7, "metrics-export-port": base + 8,
        "min-worker-port": base + 10, "max-worker-port": base + PORTS - 1,
    }  # fmt: skip
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    words += ["--log-color=false", f"--node-ip-address={address}"]
    words += [f"--num-cpus={allocation.cpus}", f"--num-gpus={allocation.gpus}", f"--temp-dir={folder}"]
    words += [f"--{name}={port}" for name, port in ports.items()]
    if allocation.memory_mib is not None:
        store = max(80 << 20, int(allocation.memory_mib * (1 << 20) * 0.3))
        words += [f"--object-store-memory={store}", f"--memory={(allocation.memory_mib << 20) - store}"]
    if head is not None:
        return [*words, f"--address={head}"]
    words += [
        "--head",
        f"--port={base}",
        f"--dashboard-port={base + 2}",
    ]
    if importlib.util.find_spec("grpc") is not None:
        # Where Ray's client is installed its server comes with the head, by default on the one port 10001 of the
        # machine; where it is not, naming a port is an error.
        words += [f"--ray-client-server-port={base + 1}"]
    words += ["--include-dashboard=false", f"--system-config={json.dumps(HEALTH)}"]
    return words


class Step:
    """This node's part of the cluster, from start to end.

    Args:
        run: The prepared run, on a file system that all nodes share.
        allocation: What Slurm gave.
        environment: Of this process.
    """

    def __init__(self, run: RunDir, allocation: Allocation, environment: Mapping[str, str]) -> None:
        self._run, self._allocation = run, allocation
        root = environment.get("BDL_RAY_TMP", "/tmp")
        number = allocation.job.partition("-")[0]
        self._folder = Path(root) / f"bdl-{os.getuid()}-{number}-{allocation.rank}"
        if len(str(self._folder)) > LONGEST_FOLDER:
            raise UsageError(
                f"BDL_RAY_TMP={root} is too long for Ray's sockets: {self._folder} has {len(str(self._folder))} "
                f"characters, {LONGEST_FOLDER} are possible. Name a short folder of this node."
            )
        # The head says here where it is, and the token, to the job's own user.
        self._meeting = run.path / "slurm" / f"head-{allocation.job}.json"
        self._environment = {
            **without_slurm(environment),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_AUTH_MODE": "token",
            "BDL_NODE": allocation.node,
            KEEP_STOP: "1",  # the job's script may be asked to stop while Ray starts
            # On SIGTERM a node hands its work over for so long; of the head nobody could take it.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0" if allocation.rank == 0 else "15",
        }
        self._ray: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run this node's part; the status of the step."""
        shutil.rmtree(self._folder, ignore_errors=True)  # of an earlier start of this very job
        self._folder.mkdir(mode=0o700)
        try:
            if self._allocation.rank == 0:
                return self._lead()
            try:
                return self._join()
            except RunFailedError as error:  # a node less; the driver's status is the job's
                print(f"ray step: {error}", file=sys.stderr)
                return 0
        finally:
            self._end_ray()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _lead(self) -> int:
        address = address_of(self._allocation.node)
        base = free_ports(self._allocation, address)
        head, token = f"{address}:{base}", secrets.token_hex(32)
        self._environment["RAY_AUTH_TOKEN"] = token
        self._start_ray(start_command(self._allocation, address, base, self._folder, None))
        try:
            self._until(lambda: _answers(address, base), "the head of Ray did not start")
        except RunFailedError:
            self._publish({})  # the others need not wait
            raise
        self._publish({"address": head, "token": token})
        try:
            return self._drive(head)
        finally:
            self._meeting.unlink(missing_ok=True)

    def _drive(self, head: str) -> int:
        if self._run.stop_file.exists():
            print("asked to stop before training began", flush=True)
            return Exit.STOPPED
        driver = subprocess.Popen(driver_command(self._run, head, sys.executable), env=self._environment)
        # Slurm sends a signal to every process of a step, so the driver has it already.
        lost_at: float | None = None
        while (status := driver.poll()) is None:
            if self._ray is not None and self._ray.poll() is not None:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > LOST_S:
                    driver.kill()
            time.sleep(0.1)
        return 128 - status if status < 0 else status

    def _join(self) -> int:
        self._until(self._meeting.is_file, "the head did not say where it is")
        where = json.loads(self._meeting.read_text())
        if not where:
            return Exit.FAILED
        self._environment["RAY_AUTH_TOKEN"] = where["token"]
        host, _, port = where["address"].rpartition(":")
        address = address_of(self._allocation.node)
        base = free_ports(self._allocation, address)
        self._start_ray(start_command(self._allocation, address, base, self._folder, where["address"]))
        assert self._ray is not None
        misses = 0
        while self._ray.poll() is None and misses < 3:
            misses = 0 if _answers(host, int(port)) else misses + 1
            time.sleep(1)
        if misses == 0:  # Ray ended, the head did not: the others go on, and the driver's status is the job's
            print(
                f"On {self._allocation.node} Ray ended before the run did.\n{self._said()}", file=sys.stderr
            )
        return 0

    def _publish(self, where: Mapping[str, str]) -> None:
        self._meeting.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._meeting.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(where, file)
        temporary.replace(self._meeting)

    def _start_ray(self, command: Sequence[str]) -> None:
        # An ignored signal stays ignored across exec: Slurm's warnings would otherwise end Ray's daemons.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in DEAF_TO}
        try:
            with (self._folder / "start.log").open("wb") as log:
                self._ray = subprocess.Popen(
                    command, env=self._environment, stdout=log, stderr=log, start_new_session=True
                )
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _until(self, condition: Any, otherwise: str) -> None:
        end = time.monotonic() + START_S
        while not condition():
            gone = self._ray is not None and self._ray.poll() is not None
            if gone or time.monotonic() > end:
                raise RunFailedError(f"On {self._allocation.node}: {otherwise}.\n{self._said()}")
            time.sleep(0.2)

    def _said(self) -> str:
        log = self._folder / "start.log"
        return log.read_text(errors="replace")[-2000:] if log.is_file() else ""

    def _end_ray(self) -> None:
        if self._ray is None:
            return
        if self._ray.poll() is None:
            self._ray.terminate()
            try:
                self._ray.wait(20)
            except subprocess.TimeoutExpired:
                self._ray.kill()
        with suppress(ProcessLookupError):  # daemons and workers of this session only
            os.killpg(self._ray.pid, signal.SIGKILL)


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), 1.0):
            return True
    except OSError:
        return False


def main(words: Sequence[str]) -> int:
    if len(words) != 1:
        print(__doc__, file=sys.stderr)
        return Exit.USAGE
    # The driver answers signals; this process only waits for it.
    for number in (*DEAF_TO, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: None)

    def step() -> Any:
        return Step(RunDir.open(Path(words[0]).absolute()), Allocation.of(os.environ), os.environ)()

    return int(guarded("ray step", step))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
