"""The driver of a submitted run."""

import yaml

from bdl_train.distributed.driver_command import driver_command
from bdl_train.runs import RunDir


def test_the_driver_takes_over_what_the_run_says_of_stacks(tmp_path):
    cluster = {
        "_target_": "x",
        "nodes": 2,
        "num_workers": None,
        "members_per_stack": 3,
        "gpus_per_stack": 0.5,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"cluster": cluster}))
    words = driver_command(RunDir(tmp_path), "10.0.0.1:6379", "py")
    assert words[3:] == [
        "train", f"resume={tmp_path}", "cluster=ray_cluster", "cluster.address=10.0.0.1:6379",
        "cluster.num_workers=null", "cluster.members_per_stack=3", "cluster.gpus_per_stack=0.5",
    ]  # fmt: skip
