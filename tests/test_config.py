"""Composing: plain containers out, one clear message for every wrong key, choice or value."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bdl_train.config import compose, mask_secrets, to_yaml
from bdl_train.errors import UsageError
from bdl_train.schema import Schema, choices, nearest_key, shipped

LINEAR = "{_target_: torch.nn.Linear, in_features: 8, out_features: 2}"
RUN = ["run=r", "input=a.csv", "output=b.csv"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's config folder with a model, a data set and experiments."""
    files = {
        "model/linear.yaml": "_target_: torch.nn.Linear\nin_features: 8\nout_features: 2\n",
        "data/mine.yaml": "_target_: my_package.Data\nbatch_size: 4\n",
        "trainer/typo.yaml": "max_epoch: 3\n",
        "experiment/good.yaml": "# @package _global_\ndefaults:\n- override /model: linear\nnum_members: 2\n",
        "experiment/junk.yaml": "# @package _global_\njunk: 3\n",
        "experiment/open.yaml": "# @package _global_\nallow: [os]\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_result_is_plain_and_holds_every_group():
    config = compose("train")
    assert json.loads(json.dumps(config)) == config
    schema = Schema.of("train")
    assert set(config) == {group for group, choice in schema.groups.items() if choice} | {
        key.name.partition(".")[0] for key in schema.keys
    }


def test_overrides_of_keys_and_choices():
    config = compose(
        "train", ["model=lenet", "num_members=3", "trainer.max_epochs=7", "seed=1", "seed=2", "seed=1"]
    )
    assert config["model"]["_target_"].startswith("bdl_train.models.lenet.")
    assert (config["num_members"], config["trainer"]["max_epochs"], config["seed"]) == (3, 7, 1)


@pytest.mark.parametrize("choice", choices("data"))
def test_data_root_is_a_key_of_every_data_set(choice, monkeypatch):
    loaded = yaml.safe_load((shipped() / "data" / f"{choice}.yaml").read_text())
    needed = [f"data.{key}=x" for key, value in loaded.items() if value == "???"]
    monkeypatch.delenv("BDL_DATA_ROOT", raising=False)
    assert compose("train", [f"data={choice}", *needed])["data"]["root"] == "./data"
    monkeypatch.setenv("BDL_DATA_ROOT", "/some/where")
    assert compose("train", [f"data={choice}", *needed])["data"]["root"] == "/some/where"
    assert compose("train", [f"data={choice}", *needed, "data.root=a b=(c)"])["data"]["root"] == "a b=(c)"


def test_data_root_stays_for_foreign_data(own):
    assert compose("train", ["data=mine"], own)["data"].keys() == {"root", "_target_", "batch_size"}
    assert compose("train", ["data={_target_: my_package.Data}"])["data"].keys() == {"root", "_target_"}


@pytest.mark.parametrize(
    "word", [f"model={LINEAR}", f"+model={LINEAR}", "model=linear", "experiment=good", "+model=linear"]
)
def test_a_foreign_class_leaves_nothing_of_the_default_choice(word, own):
    assert compose("train", [word], own)["model"] == yaml.safe_load(LINEAR)


def test_a_foreign_class_in_braces_beats_an_experiment_and_takes_overrides(own):
    config = compose("train", ["experiment=good", f"model={LINEAR}", "model.in_features=9"], own)
    assert config["model"] == {"_target_": "torch.nn.Linear", "in_features": 9, "out_features": 2}


def test_braces_without_a_target_change_the_chosen_class():
    assert compose("train", ["model={hidden: [3]}"])["model"]["hidden"] == [3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.hiden=[3]"],
            r"Unknown key 'model.hiden' \(from 'model.hiden=\[3\]'\). Did you mean 'model.hidden'?",
        ),
        (["lr=3"], "Unknown key 'lr' .* Did you mean 'inference.lr' or 'optimizer.lr'?"),
        (["epochs=3"], "Unknown key 'epochs' .* Did you mean 'trainer.max_epochs'?"),
        (["num_member=3"], "Unknown key 'num_member' .* Did you mean 'num_members'?"),
        (["modl=mlp"], "Unknown key 'modl' .* Did you mean 'model'?"),
        (["+junk=1"], r"Unknown key 'junk' \(from '\+junk=1'\)"),
        (["++junk.a=1"], r"Unknown key 'junk' \(from '\+\+junk.a=1'\)"),
        (["~junk"], "Unknown key 'junk' .from '~junk'"),
        (["num_members.x=3"], "Unknown key 'num_members.x'"),
        (["data.protocol=gap"], r"The chosen data has no such setting; data=uci has it\."),
        (["optimizer.eps=1e-6"], r"Unknown key 'optimizer.eps' .* write \+optimizer.eps=\.\.\."),
        (["model=mpl"], "Unknown model 'mpl'. Did you mean 'mlp'. Choose one of: .*lenet.*mlp"),
        (["model=3"], "Unknown model '3'. Choose one of: .*mlp"),
        (["model=null"], "Unknown model 'null'. Choose one of: .*mlp"),
        (["experiment=nothing"], "Unknown experiment 'nothing'."),
        (["data.split=0,1,2"], "'data.split=0,1,2' names several values.*-m"),
        (["seed=range(1,3)"], r"'seed=range\(1,3\)' names several values"),
        (["model.hidden.x=1"], "Cannot compose the config from 'model.hidden.x=1'"),
        (["~num_members"], "'num_members' was removed, but bdl train needs it: leave out '~num_members'"),
        (["~model"], "'model' was removed, but bdl train needs it"),
        (["name=${nokey}"], "name: Interpolation key 'nokey' not found"),
        (["name=${oc.env:BDL_NO_SUCH}"], "name: .*BDL_NO_SUCH"),
        (["seed=1", "data@x=uci"], "Cannot compose the config from 'seed=1 data@x=uci'"),
    ],
)
def test_wrong_words_get_one_clear_message(words, message):
    with pytest.raises(UsageError, match=message):
        compose("train", words)


def test_keys_of_other_verbs_are_unknown():
    with pytest.raises(UsageError, match=r"Unknown key 'model' \(from 'model=mlp'\).*`bdl predict --help`"):
        compose("predict", [*RUN, "model=mlp"])


def test_added_keys_are_left_to_the_class_but_not_where_there_is_none(own):
    assert compose("train", ["+optimizer.eps=1e-6"])["optimizer"]["eps"] == 1e-6
    assert compose("train", ["model=linear", "+model.bias=true"], own)["model"]["bias"] is True


def test_unknown_keys_of_experiments_and_choices_are_refused(own):
    with pytest.raises(UsageError, match=r"Unknown key 'junk' \(from a chosen config file\)"):
        compose("train", ["experiment=junk"], own)
    with pytest.raises(
        UsageError, match=r"Unknown key 'trainer.max_epoch' .*Did you mean 'trainer.max_epochs'"
    ):
        compose("train", ["trainer=typo"], own)


def test_missing_keys_are_named():
    with pytest.raises(UsageError, match=r"input and output must be given: bdl predict input=... output=..."):
        compose("predict", ["run=r"])


def test_allow_counts_on_the_command_line_only(own):
    assert compose("train", ["allow=[os]"])["allow"] == ["os"]
    with pytest.raises(UsageError, match=r"allow=\['os'\] stands in a config file"):
        compose("train", ["experiment=open"], own)


def test_config_dir_must_exist_and_not_shadow(own):
    with pytest.raises(UsageError, match=r"--config-dir is '.*/nowhere', which is not a folder"):
        compose("train", [], own / "nowhere")
    (own / "model" / "mlp.yaml").write_text("_target_: torch.nn.Linear\n")
    with pytest.raises(UsageError, match=r"'model/mlp.yaml' in --config-dir .* rename it"):
        compose("train", [], own)


def test_broken_yaml_of_the_user_is_no_traceback(own):
    (own / "model" / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(UsageError):
        compose("train", ["model=broken"], own)


def test_a_config_dir_with_blanks_and_equals_signs(own):
    odd = own.parent / "my conf=(1)"
    own.rename(odd)
    assert compose("train", ["model=linear"], odd)["model"]["in_features"] == 8


def test_yaml_shows_what_is_missing_and_hides_secrets():
    shown = yaml.safe_load(to_yaml("predict", ["run=r"]))
    assert (shown["run"], shown["input"]) == ("r", "???")
    assert yaml.safe_load(to_yaml("train", ["+model.api_key=abc"]))["model"]["api_key"] == "***"


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "runs", "compare"])
def test_every_key_of_a_root_config_has_a_comment(verb):
    schema = Schema.of(verb)
    assert [key.name for key in schema.keys if not key.comment] == []
    plain = yaml.safe_load((shipped() / f"{verb}.yaml").read_text())
    assert {key.name.partition(".")[0] for key in schema.keys} == set(plain) - {"defaults"}


@pytest.mark.parametrize(
    ("word", "near"),
    [("hidden", "model.hidden"), ("model.hidde", "model.hidden"), ("model.zzz", ""), ("sed", "seed")],
)
def test_nearest_key(word, near):
    assert nearest_key(word, ["seed", "model", "model.hidden", "model.norm", "trainer.zzy"]) == (
        f" Did you mean '{near}'?" if near else ""
    )


@pytest.mark.parametrize(
    "name",
    ["token", "api_key", "apiKey", "WANDB_API_KEY", "password", "clientSecret", "key1", "tracking.secret"],
)
@pytest.mark.parametrize("value", ["abc", 1234, ["a", "b"], {"x": "abc"}])
def test_secrets_are_masked(name, value):
    masked = mask_secrets({"tracking": {name: value}, "list": [{name: value}]})
    assert "abc" not in str(masked)
    assert "1234" not in str(masked)
    assert "'a'" not in str(masked)
    assert "***" in str(masked["tracking"])
    assert "***" in str(masked["list"])


@pytest.mark.parametrize(
    "config",
    [
        {"monkey": "a", "keyboard": "b", "token_dim": 3, "key_file": "/x", "num_tokens": 5, "secretary": "c"},
        {"token": None, "use_key": True, "passwords": [], "a": {"b": [1, {"c": 2.5}]}},
    ],
)
def test_the_rest_is_not_masked(config):
    assert mask_secrets(config) == config


def test_masking_copies():
    config = {"a": {"token": "x"}}
    mask_secrets(config)
    assert config == {"a": {"token": "x"}}


def test_importing_config_is_cheap():
    heavy = {"hydra", "omegaconf", "yaml", "pydantic", "torch"}
    code = f"import sys, bdl_train.config; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
