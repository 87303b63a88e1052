"""Where the token of a foreign Ray comes from."""

import pytest

from bdl_train.distributed.ray_token import token_of
from bdl_train.errors import UsageError


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_the_given_file_then_the_environment_then_rays_own_files(tmp_path, monkeypatch):
    assert token_of(None) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of home\n")
    assert token_of(None) == "of home"
    (tmp_path / "named").write_text("named\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert token_of(None) == "named"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "set")
    assert token_of(None) == "set"
    (tmp_path / "mine").write_text("mine\n")
    (tmp_path / "mine").chmod(0o600)
    assert token_of(str(tmp_path / "mine")) == "mine"


def test_a_file_open_to_others_is_refused_without_its_content(tmp_path):
    (tmp_path / "open").write_text("secret")
    (tmp_path / "open").chmod(0o640)
    with pytest.raises(UsageError, match=r"open can be read by others: chmod 600") as caught:
        token_of(str(tmp_path / "open"))
    assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        token_of(str(tmp_path / "gone"))
