"""A RayJob for KubeRay: the YAML that makes a Ray cluster in Kubernetes, carries out one run, and goes away."""

import shlex
from dataclasses import dataclass
from typing import Annotated, Any

import yaml
from pydantic import Field

from bdl_train.distributed import Resources, Submission, Submitter
from bdl_train.distributed.driver_command import driver_command
from bdl_train.errors import UsageError
from bdl_train.files import write_bytes
from bdl_train.runs import RunDir

FILE = "rayjob.yaml"


@dataclass(frozen=True, kw_only=True)
class Kuberay(Submitter):
    """Writes `rayjob.yaml` into the run directory; `kubectl create -f` hands it over.

    Attributes:
        image: With this package and its Python environment; its `python` is called.
        namespace: Of the job.
        volume_claim: A PersistentVolumeClaim, ReadWriteMany, that holds the run directory.
        mount_path: Where all pods mount it: the same path as here, since the run directory is named by it.
        workers: Pods beside the head, which only drives.
        cpus_per_worker, gpus_per_worker, memory_per_worker: Requests and limits of each.
        ttl_s: Seconds after which a finished job is removed.
        num_workers, members_per_stack, cpus_per_stack, gpus_per_stack, ranks_per_stack, max_retries: As in `ray_local`.
    """

    image: str
    namespace: str
    volume_claim: str
    mount_path: str
    workers: Annotated[int, Field(ge=1)]
    cpus_per_worker: Annotated[int, Field(ge=1)]
    gpus_per_worker: Annotated[int, Field(ge=0)]
    memory_per_worker: str
    ttl_s: Annotated[int, Field(ge=0)]
    num_workers: Annotated[int, Field(ge=1)] | None
    members_per_stack: Annotated[int, Field(ge=1)] | None
    cpus_per_stack: Annotated[int, Field(ge=1)] | None
    gpus_per_stack: Annotated[float, Field(ge=0, le=1)]
    ranks_per_stack: Annotated[int, Field(ge=1)]
    max_retries: Annotated[int, Field(ge=0)]

    def resources(self) -> Resources:
        return Resources.of_nodes([(self.cpus_per_worker, self.gpus_per_worker)] * self.workers)

    def submit(self, run: RunDir) -> Submission:
        write_bytes(run.path / FILE, yaml.safe_dump(self.manifest(run), sort_keys=False).encode())
        print(f"hand it over with: kubectl create -f {run.path / FILE}")
        return Submission("kuberay", (self._name(run),), FILE)

    def state(self, submission: Submission) -> str:
        raise UsageError("follow=true: a job that kubectl hands over is watched with kubectl.")

    def manifest(self, run: RunDir) -> dict[str, Any]:
        """The RayJob (ray.io/v1) of a run."""
        there = RunDir(run.path.absolute())
        worker = {"cpu": self.cpus_per_worker, "memory": self.memory_per_worker}
        if self.gpus_per_worker:
            worker["nvidia.com/gpu"] = self.gpus_per_worker
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": self._name(run), "namespace": self.namespace},
            "spec": {
                "entrypoint": shlex.join(driver_command(there, "auto", "python")),
                "submissionMode": "K8sJobMode",
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": self.ttl_s,
                "backoffLimit": self.max_retries,
                "rayClusterSpec": {
                    "authOptions": {"mode": "token"},
                    "headGroupSpec": {
                        "rayStartParams": {"num-cpus": "0"},
                        "template": self._pod("head", {"cpu": 2, "memory": "4Gi"}),
                    },
                    "workerGroupSpecs": [
                        {
                            "groupName": "members",
                            "replicas": self.workers,
                            "minReplicas": 1,
                            "maxReplicas": self.workers,
                            "rayStartParams": {},
                            "template": self._pod("member", worker),
                        }
                    ],
                },
            },
        }

    def _pod(self, name: str, resources: dict[str, Any]) -> dict[str, Any]:
        mount = {"name": "runs", "mountPath": self.mount_path}
        container = {
            "name": f"ray-{name}",
            "image": self.image,
            "resources": {"requests": dict(resources), "limits": dict(resources)},
            "volumeMounts": [mount],
        }
        volume = {"name": "runs", "persistentVolumeClaim": {"claimName": self.volume_claim}}
        return {"spec": {"containers": [container], "volumes": [volume]}}

    @staticmethod
    def _name(run: RunDir) -> str:
        return f"bdl-{run.path.name}".lower()
