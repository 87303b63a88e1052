import json

import numpy as np
import torch

from bdl_train.specs import InputSpec, TargetKind, TargetSpec


def test_images_are_scaled_per_channel_as_by_hand():
    spec = InputSpec((2, 3, 3), pixel_mean=(0.2, 0.6), pixel_std=(0.5, 0.1))
    raw = np.random.default_rng(0).integers(0, 256, (4, 5, 2, 3, 3)).astype(np.uint8)
    expected = (raw / 255 - np.array([0.2, 0.6])[:, None, None]) / np.array([0.5, 0.1])[:, None, None]
    got = spec.prepare(torch.from_numpy(raw), torch.float64)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_tables_are_cast_and_nothing_else():
    x = torch.tensor([[1.5, -2.0]])
    assert torch.equal(InputSpec((2,), (1, 1)).prepare(x, torch.float64), x.double())


def test_specs_survive_json():
    inputs = InputSpec((3,), (1, 2), ("age", "sex"))
    target = TargetSpec(TargetKind.CLASS, "risk", ("low", "high"))
    assert InputSpec.from_json(json.loads(json.dumps(inputs.to_json()))) == inputs
    assert TargetSpec.from_json(json.loads(json.dumps(target.to_json()))) == target
    assert target.num_classes == 2
    assert not inputs.is_image
