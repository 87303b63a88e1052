"""The posterior on disk: the same bits in a process that never trained, and every kind of damage refused."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from small_posteriors import PIXELS, RESNET, small_artefact, write_artefact
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.posteriors.artefact import Artefact, read_artefact, write_member
from bdl_train.predictive.predict import Predictor
from bdl_train.predictive.stats import ClassStats
from bdl_train.priors.from_posterior import FromPosterior
from bdl_train.seeds import Stream, member_seed

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def examples(artefact: Artefact) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if artefact.inputs.is_image:
        return torch.randint(0, 256, (6, *artefact.inputs.shape), generator=generator, dtype=torch.uint8)
    return torch.randn(40, *artefact.inputs.shape, generator=generator)


def predictions(artefact: Artefact) -> np.ndarray:
    columns = []
    for tile in Predictor(artefact)(examples(artefact)):
        stats = tile.stats
        mean = stats.mean_probs if isinstance(stats, ClassStats) else stats.mean[:, None]
        columns.append(torch.cat([mean, stats.total[:, None], stats.epistemic[:, None]], dim=1))
        if tile.mixture is not None:
            columns[-1] = torch.cat([columns[-1], tile.mixture.quantile(torch.tensor([0.1, 0.9])).T], dim=1)
    return torch.cat(columns).numpy()


# --- round trip -----------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "deep ensemble": {"likelihood": "categorical", "method": "ensemble"},
    "swag with learned noise": {"likelihood": "gaussian", "method": "swag", "num_draws": 4},
    "batch norm": {
        "likelihood": "categorical",
        "method": "atoms",
        "architecture": RESNET,
        "inputs": PIXELS,
        "num_draws": 3,
    },
    "double precision": {"likelihood": "student_t", "method": "swag", "num_draws": 2, "dtype": "float64"},
}

SCRIPT = """
import sys
import numpy as np
import torch

torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_artefact import predictions
from bdl_train.posteriors.artefact import read_artefact

assert "pytorch_lightning" not in sys.modules, "predicting must not load the trainer"
for folder in sys.argv[2:]:
    np.save(f"{folder}.npy", predictions(read_artefact(Path(folder))))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_read_gives_back_the_same_predictions(kind: str, tmp_path: Path):
    artefact = small_artefact(**KINDS[kind])
    write_artefact(tmp_path, artefact)
    np.testing.assert_array_equal(predictions(read_artefact(tmp_path)), predictions(artefact))


def test_another_process_predicts_the_same_bytes(tmp_path: Path):
    names = ["swag with learned noise", "batch norm"]
    artefacts = [small_artefact(**KINDS[name]) for name in names]
    for i, artefact in enumerate(artefacts):
        write_artefact(tmp_path / str(i), artefact)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    folders = [str(tmp_path / str(i)) for i in range(len(artefacts))]
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), *folders]
    subprocess.run(command, check=True, env=env, timeout=120)
    for folder, artefact in zip(folders, artefacts, strict=True):
        assert np.load(f"{folder}.npy").tobytes() == predictions(artefact).tobytes()


def test_what_is_read_is_in_eval_mode_and_repeats_itself(tmp_path: Path):
    artefact = small_artefact(**KINDS["batch norm"])
    write_artefact(tmp_path, artefact)
    read = read_artefact(tmp_path)
    assert not read.network().training
    assert predictions(read).tobytes() == predictions(read).tobytes()
    assert (read.inputs, read.target, read.layout) == (artefact.inputs, artefact.target, artefact.layout)
    assert (read.likelihood, read.architecture) == (artefact.likelihood, artefact.architecture)


def test_reading_leaves_the_global_generator_alone(tmp_path: Path):
    write_artefact(tmp_path, small_artefact())
    state = torch.get_rng_state()
    read_artefact(tmp_path).network()
    assert torch.equal(torch.get_rng_state(), state)


def test_writing_a_member_again_gives_the_same_file(tmp_path: Path):
    member = small_artefact(method="swag").posterior.members[0]
    first = write_member(tmp_path, 7, member)
    content = (tmp_path / first["file"]).read_bytes()
    assert write_member(tmp_path, 7, member) == first
    assert (tmp_path / first["file"]).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [first["file"]]


def test_a_stale_file_that_the_header_does_not_list_is_not_read(tmp_path: Path):
    artefact = small_artefact()
    write_artefact(tmp_path, artefact)
    stale = small_artefact(num_members=5).posterior.members[4]
    write_member(tmp_path, 4, stale)
    (tmp_path / "member-00005.safetensors").write_bytes(b"half written")
    assert read_artefact(tmp_path).posterior.ids == [0, 1, 2]


def test_lost_members_leave_a_valid_mixture_of_the_others(tmp_path: Path):
    artefact = small_artefact(method="swag", num_draws=2)
    write_artefact(tmp_path, artefact, lost=(1,))
    read = read_artefact(tmp_path).posterior
    assert (read.ids, read.num_components()) == ([0, 2], 4)
    (draws,) = read.draw(chunk_size=10)
    assert float(draws.log_weights.exp().sum()) == pytest.approx(1)
    (all_draws,) = artefact.posterior.draw(chunk_size=10)
    assert torch.equal(draws.flat, all_draws.flat[[0, 1, 4, 5]])
    assert draws.members.tolist() == [0, 0, 2, 2]


def test_moments_are_those_of_the_members_and_the_prior_reads_them(tmp_path: Path):
    artefact = small_artefact("gaussian", "swag", num_draws=2)
    write_artefact(tmp_path / "posterior", artefact)
    stored = load_file(tmp_path / "posterior" / "moments.safetensors")
    draws = [
        torch.stack([flat for flat, _ in member.draw(2000, member_seed(0, m, Stream.DRAWS))])
        for m, member in enumerate(artefact.posterior.members)
    ]
    for m, drawn in enumerate(draws):
        var = stored["var"][m]
        assert bool(((drawn.mean(0) - stored["mean"][m]).abs() < 6 * (var / 2000).sqrt()).all())
        # A variance estimated from n draws is off by sqrt(2 / n) of itself; allow six times that.
        torch.testing.assert_close(drawn.var(0), var, rtol=6 * (2 / 2000) ** 0.5, atol=1e-12)
    prior = FromPosterior(run=str(tmp_path), moments="per_member", tempering=1.0, min_std=1e-6)
    weights = [name for name in artefact.layout.names if not name.startswith("likelihood.")]
    bound = prior.bind(artefact.layout.select(weights), [2, 0])
    columns = artefact.layout.columns(weights)
    torch.testing.assert_close(bound.mean, stored["mean"][[2, 0]][:, columns])
    torch.testing.assert_close(bound.std.square(), stored["var"][[2, 0]][:, columns], rtol=1e-5, atol=1e-12)


# --- damage ---------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def rewritten(folder: Path, change: Change) -> None:
    path = folder / "posterior.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def swap_member(folder: Path, tensors: dict[str, Tensor], target: str | None = None) -> None:
    """What somebody could do who also mends the hash."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    (folder / "member-00001.safetensors").write_bytes(content)

    def change(meta: dict[str, Any]) -> None:
        meta["members"][1]["sha256"] = hashlib.sha256(content).hexdigest()
        if target is not None:
            meta["members"][1]["_target_"] = target

    rewritten(folder, change)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    folder = tmp_path / "posterior"
    write_artefact(folder, small_artefact("gaussian"))
    assert read_artefact(folder).posterior.num_members == 3
    return folder


def put(*keys: Any, value: Any) -> Change:
    def change(meta: dict[str, Any]) -> None:
        node: Any = meta
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


def drop(*keys: Any) -> Change:
    def change(meta: dict[str, Any]) -> None:
        node: Any = meta
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]

    return change


HEADER: dict[str, tuple[Change, str]] = {
    "newer schema": (put("schema_version", value=2), "schema version 2, this bdl_train reads 1"),
    "no schema": (drop("schema_version"), "schema version None"),
    "no member": (put("members", value=[]), "no finished member"),
    "only lost members": (
        lambda meta: [one.update(status="failed") for one in meta["members"]],
        "no finished member",
    ),
    "a member twice": (put("members", 1, "id", value=0), r"members \[0, 0, 2\]"),
    "no draws": (put("num_draws", value=0), "num_draws 0"),
    "another hash": (put("members", 0, "sha256", value="0" * 64), "does not match its recorded SHA-256"),
    "no hash": (drop("members", 0, "sha256"), "KeyError 'sha256'"),
    "a file elsewhere": (put("members", 0, "file", value="../member-00000.safetensors"), "is missing"),
    "an absolute file": (put("members", 0, "file", value="/etc/hostname"), "is missing"),
    "the folder itself": (put("members", 0, "file", value=".."), "is missing"),
    "a file that is a number": (put("members", 0, "file", value=3), "damaged"),
    "a member that runs a command": (put("members", 0, "_target_", value="os.system"), "outside the allowed"),
    "a member that unpickles": (put("members", 0, "_target_", value="torch.load"), "outside the allowed"),
    "a member that is a layer": (
        put("members", 0, "_target_", value="torch.nn.Linear"),
        "expected a class that derives from",
    ),
    "an abstract member": (
        put("members", 0, "_target_", value="bdl_train.posteriors.MemberPosterior"),
        "abstract class",
    ),
    "a likelihood that runs a command": (
        put("likelihood", "_target_", value="subprocess.Popen"),
        "outside the allowed",
    ),
    "a prior as likelihood": (
        put("likelihood", "_target_", value="bdl_train.priors.gaussian.Gaussian"),
        "expected a class that derives from",
    ),
    "a network that runs a command": (
        put("architecture", value={"_target_": "os.system", "command": "true"}),
        "outside the allowed",
    ),
    "a network within that runs a command": (
        put(
            "architecture",
            value={
                "_target_": "torch.nn.Sequential",
                "_args_": [{"_target_": "os.system", "command": "true"}],
            },
        ),
        "outside the allowed",
    ),
    "an optimiser as network": (
        put("architecture", "_target_", value="torch.optim.SGD"),
        "expected a class that derives from",
    ),
    "another width": (put("architecture", "hidden", value=[9]), "another architecture or likelihood"),
    "a huge network": (put("architecture", "hidden", value=[10**12]), "damaged"),
    "known noise": (put("likelihood", "learn_noise", value=False), "another architecture or likelihood"),
    "another likelihood": (
        put("likelihood", value={"_target_": "bdl_train.likelihoods.poisson.Poisson"}),
        "does not fit the target",
    ),
    "a setting of the wrong type": (put("likelihood", "noise_std", value="high"), "likelihood.noise_std"),
    "more inputs": (put("inputs", "shape", value=[4]), "another architecture or likelihood"),
    "inputs without a shape": (drop("inputs", "shape"), "damaged"),
    "an unknown kind of target": (put("target", "kind", value="ordinal"), "damaged"),
    "a target of scale 0": (put("target", "scale", value=0.0), "scale 0.0"),
    "a target without scale": (put("target", "scale", value=None), "damaged"),
    "a function as dtype": (put("dtype", value="load"), "KeyError 'load'"),
    "weights of another precision": (put("dtype", value="float64"), "torch.float32"),
    "fewer names than shapes": (lambda meta: meta["layout"]["names"].pop(), "damaged"),
    "a layout of text": (put("layout", "shapes", value=["ab"]), "damaged"),
    "a transform of another kind": (put("transform", value={"columns": 3}), "damaged"),
}


@pytest.mark.parametrize("case", HEADER)
def test_a_changed_header_is_refused(case: str, stored: Path):
    change, message = HEADER[case]
    rewritten(stored, change)
    with pytest.raises(UsageError, match=message):
        read_artefact(stored)


KEYS = (
    "layout",
    "members",
    "num_draws",
    "draw_seed",
    "architecture",
    "likelihood",
    "inputs",
    "target",
    "dtype",
)


@pytest.mark.parametrize("key", [*KEYS, "transform"])
def test_a_missing_key_is_named(key: str, stored: Path):
    rewritten(stored, drop(key))
    with pytest.raises(UsageError, match=f"'{key}'"):
        read_artefact(stored)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [None, [], "x", -1, {"a": []}])
def test_a_key_of_the_wrong_kind_is_refused(key: str, value: Any, stored: Path):
    if key == "draw_seed" and value == -1:
        return  # any whole number is a seed
    rewritten(stored, put(key, value=value))
    with pytest.raises(UsageError):
        read_artefact(stored)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "3",
        "\x80",
        "[" * 100_000,
        '{"schema_version": 1, "extra": NaN}',
        '{"schema_version": Infinity}',
    ],
    ids=["empty", "torn", "a list", "a number", "no text", "deep", "NaN", "Infinity"],
)
def test_what_is_no_strict_json_is_refused(text: str, stored: Path):
    (stored / "posterior.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"posterior\.json"):
        read_artefact(stored)


def test_infinite_numbers_are_refused(stored: Path):
    path = stored / "posterior.json"
    path.write_text(path.read_text().replace('"scale": 2.5', '"scale": 1e999'))
    with pytest.raises(UsageError, match="scale inf"):
        read_artefact(stored)


def test_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="is missing"):
        read_artefact(tmp_path / "nowhere")


@pytest.mark.parametrize("at", [0, 20, -1])
def test_a_flipped_byte_is_noticed(at: int, stored: Path):
    path = stored / "member-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"member-00002\.safetensors does not match its recorded SHA-256"):
        read_artefact(stored)


def test_a_missing_or_cut_file_is_noticed(stored: Path):
    path = stored / "member-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UsageError, match="does not match"):
        read_artefact(stored)
    path.unlink()
    with pytest.raises(UsageError, match="is missing"):
        read_artefact(stored)


def test_tensors_of_another_shape_are_refused_even_with_the_right_hash(stored: Path):
    size = small_artefact("gaussian").layout.num_params
    for tensors, message in (
        ({"atoms": torch.zeros(1, size + 1)}, f"holds {size + 1} parameters, the architecture has {size}"),
        ({"atoms": torch.zeros(1, size, dtype=torch.float16)}, "float16"),
        ({"atoms": torch.zeros(1, size), "buffer:extra": torch.zeros(1, 2)}, "extra"),
        ({"weights": torch.zeros(1, size)}, "need a tensor 'atoms'"),
    ):
        swap_member(stored, tensors)
        with pytest.raises(UsageError, match=message):
            read_artefact(stored)


def test_a_file_that_is_no_safetensors_is_refused_even_with_the_right_hash(stored: Path):
    content = b"\x80\x04K\x01."  # a pickle
    (stored / "member-00001.safetensors").write_bytes(content)
    rewritten(stored, put("members", 1, "sha256", value=hashlib.sha256(content).hexdigest()))
    with pytest.raises(UsageError, match="is no safetensors file"):
        read_artefact(stored)


def test_buffers_of_the_wrong_shape_are_refused(tmp_path: Path):
    artefact = small_artefact(**KINDS["batch norm"])
    write_artefact(tmp_path, artefact)
    tensors = dict(artefact.posterior.members[1].tensors())
    name = next(name for name in tensors if name.endswith("running_mean"))
    for changed in ({**tensors, name: tensors[name][:, :1]}, {k: t for k, t in tensors.items() if k != name}):
        swap_member(tmp_path, changed)
        with pytest.raises(UsageError, match="Member 1 holds"):
            read_artefact(tmp_path)
