"""The RayJob that is written, held to the fields of KubeRay's ray.io/v1."""

import yaml

from bdl_train.runs import find_runs, read_json

WORDS = ("cluster=kuberay", "cluster.image=registry.example/bdl:1", "cluster.volume_claim=runs")
WORDS += (
    "cluster.mount_path=/data",
    "cluster.workers=3",
    "cluster.gpus_per_worker=2",
    "cluster.gpus_per_stack=0.5",
)


def test_the_rayjob_of_a_run(bdl):
    said = bdl("submit", *WORDS, "num_members=24", "cluster.members_per_stack=2")
    assert said.status == 0, said.err
    (run,) = find_runs("runs")
    assert f"kubectl create -f {run.path}/rayjob.yaml" in said.out
    job = yaml.safe_load((run.path / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    name = job["metadata"]["name"]
    assert name == name.lower()
    assert len(name) <= 47  # KubeRay adds to it, and Kubernetes takes 63
    spec = job["spec"]
    assert set(spec) == {
        "entrypoint", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit",
        "rayClusterSpec",
    }  # fmt: skip
    assert spec["entrypoint"].startswith(f"python -m bdl_train train resume={run.path.absolute()} ")
    assert "cluster.gpus_per_stack=0.5" in spec["entrypoint"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] == workers["maxReplicas"] == 3
    for group, resources in ((workers, {"cpu": 4, "memory": "8Gi", "nvidia.com/gpu": 2}),
                             (cluster["headGroupSpec"], {"cpu": 2, "memory": "4Gi"})):  # fmt: skip
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"] == {"requests": resources, "limits": resources}
        assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/data"}]
    # Two half shares of each of 2 GPUs on 3 machines.
    assert read_json(run.plan)["num_workers"] == 12


def test_what_must_be_given_is_named(bdl):
    said = bdl("submit", "cluster=kuberay")
    assert said.status == 2
    assert "cluster.image" in said.err
