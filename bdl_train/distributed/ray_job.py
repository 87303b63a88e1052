"""Submission to a Ray cluster from outside of it, by the REST interface of its dashboard (Ray Jobs)."""

import json
import logging
import shlex
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from bdl_train.distributed import Resources, Submission, Submitter
from bdl_train.distributed.driver_command import driver_command
from bdl_train.distributed.ray_token import token_of
from bdl_train.errors import UsageError
from bdl_train.runs import RunDir

log = logging.getLogger(__name__)

STATES = {
    "PENDING": "queued",
    "RUNNING": "running",
    "STOPPED": "ended",
    "SUCCEEDED": "ended",
    "FAILED": "ended",
}


@dataclass(frozen=True, kw_only=True)
class RayJob(Submitter):
    """A Ray cluster with a dashboard; its nodes share the run directory and the Python environment.

    Attributes:
        address: Of the dashboard, `http://host:8265`.
        token_file: A file with the cluster's token, readable by its owner only; null = RAY_AUTH_TOKEN.
        timeout_s: Seconds to wait for an answer.
        python: The interpreter on the nodes; null = the one that submits.
        num_workers, members_per_stack, cpus_per_stack, gpus_per_stack, ranks_per_stack, max_retries: As in `ray_local`.
    """

    address: Annotated[str, Field(min_length=1)]
    token_file: str | None
    timeout_s: Annotated[float, Field(gt=0)]
    python: str | None
    num_workers: Annotated[int, Field(ge=1)] | None
    members_per_stack: Annotated[int, Field(ge=1)] | None
    cpus_per_stack: Annotated[int, Field(ge=1)] | None
    gpus_per_stack: Annotated[float, Field(ge=0, le=1)]
    ranks_per_stack: Annotated[int, Field(ge=1)]
    max_retries: Annotated[int, Field(ge=0)]

    def resources(self) -> Resources:
        """What its nodes have, from the cluster itself, which learns it a few seconds after they joined."""
        end = time.monotonic() + self.timeout_s
        while True:
            found = self._ask("/api/v0/nodes?detail=true&limit=10000")["data"]["result"]["result"]
            each = [one["resources_total"] for one in found if one["state"] == "ALIVE"]
            held = Resources.of_nodes((int(one.get("CPU", 0)), one.get("GPU", 0.0)) for one in each)
            if held.cpus > 0:
                return held
            if time.monotonic() > end:
                raise UsageError(f"The Ray at cluster.address={self.address} has no CPUs to hand out.")
            time.sleep(0.5)

    def submit(self, run: RunDir) -> Submission:
        there = RunDir(run.path.absolute())
        command = shlex.join(driver_command(there, "auto", self.python or sys.executable))
        log_file = run.path / "ray_job" / "job.log"
        log_file.parent.mkdir(exist_ok=True)
        entry = f"{command} > {shlex.quote(str(log_file.absolute()))} 2>&1"
        # A run that is submitted again is another job.
        name = f"bdl-{run.path.name}-{sum(1 for _ in log_file.parent.iterdir())}"
        asked = {"entrypoint": entry, "submission_id": name, "metadata": {"run": run.path.name}}
        job = self._ask("/api/jobs/", asked)["submission_id"]
        return Submission("ray_job", (job,), "ray_job/job.log", self.address)

    def state(self, submission: Submission) -> str:
        try:
            found = self._ask(f"/api/jobs/{urllib.parse.quote(submission.ids[0], safe='')}")
        except UsageError:  # it may answer again
            return "unknown"
        return STATES.get(found.get("status"), "unknown")

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer of the dashboard.

        Raises:
            UsageError: nobody answers, or the token is not the cluster's.
        """
        if not self.address.startswith(("http://", "https://")):
            raise UsageError(
                f"cluster.address must be that of the dashboard, http://host:8265, got {self.address!r}."
            )
        try:
            return _answer(self.address, path, token_of(self.token_file), self.timeout_s, body)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace").strip()
            if error.code in (401, 403):
                raise UsageError(
                    f"The Ray at cluster.address={self.address} refuses the token ({said}): set RAY_AUTH_TOKEN or "
                    "cluster.token_file to the one that the cluster was started with."
                ) from error
            raise UsageError(
                f"The Ray at cluster.address={self.address} refuses: {error.code} {said}"
            ) from error
        except (OSError, ValueError) as error:
            raise UsageError(
                f"No dashboard of Ray answers at cluster.address={self.address} within {self.timeout_s:g} s ({error}): "
                "is this its address, and was the cluster started with the dashboard?"
            ) from error


def state_of(submission: Mapping[str, Any]) -> str:
    """`queued`, `running`, `ended`, or `unknown` when the dashboard does not answer without a token.

    The address comes from a run directory, which anybody may have written: no token is sent there.
    """
    address, (job, *_) = str(submission.get("address", "")), [*submission.get("ids", ()), ""]
    if not address.startswith(("http://", "https://")):
        return "unknown"
    try:
        found = _answer(address, f"/api/jobs/{urllib.parse.quote(str(job), safe='')}", None, 5.0)
        return STATES.get(found["status"], "unknown")
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def states_of(submissions: Sequence[Mapping[str, Any]]) -> list[str]:
    """As `state_of`, of each; a dashboard that is gone costs its time limit once for eight of them."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(state_of, submissions))


def _answer(
    address: str, path: str, token: str | None, timeout_s: float, body: Mapping[str, Any] | None = None
) -> Any:
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address.rstrip("/") + path, data, headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer)
