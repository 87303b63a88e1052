"""The preset on FashionMNIST, on a third of its training pictures."""

import pytest

from bdl_train.runs import read_json


@pytest.mark.ci
@pytest.mark.timeout(1200)
def test_five_lenets_together_beat_the_best_of_them(data_root, bdl):
    words = ("experiment=fashion_mnist", "cluster=inline", f"data.root={data_root}", "data.max_train=20000")
    said = bdl("train", *words)
    assert said.status == 0, said.err
    metrics = read_json(said.run.metrics)
    assert metrics["test/nll"] < metrics["test/best_member_nll"]
    assert metrics["test/accuracy"] > 0.8
