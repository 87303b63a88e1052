from bdl_train.tracking.handed import Handed


def count(handed, stack, events):
    return [handed.is_new(stack) for _ in range(events)]


def test_a_later_session_knows_what_an_earlier_one_handed_over(tmp_path):
    first = Handed(tmp_path / "t.json", "online")
    assert count(first, "000", 3) == [True] * 3
    first.handed_over("000", 2)
    first.point_handed_over("train/nll", 40)
    first.save()
    second = Handed(tmp_path / "t.json", "online")
    assert count(second, "000", 4) == [False, False, True, True]
    assert count(second, "001", 1) == [True]
    assert second.position("000") == 4
    assert [second.is_new_point("train/nll", step) for step in (40, 41)] == [False, True]
    assert second.is_new_point("val/nll", 0)


def test_places_are_apart_unless_one_stands_for_the_other(tmp_path):
    online = Handed(tmp_path / "t.json", "online")
    count(online, "000", 2)
    online.handed_over("000", 2)
    online.save()
    assert count(Handed(tmp_path / "t.json", "offline"), "000", 1) == [True]
    offline = Handed(tmp_path / "t.json", "offline", ["online"])
    assert count(offline, "000", 3) == [False, False, True]
    offline.handed_over("000", 3)
    offline.save()
    # What waits offline was not sent.
    assert count(Handed(tmp_path / "t.json", "online"), "000", 3) == [False, False, True]


def test_the_file_is_written_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr("bdl_train.tracking.handed.SAVE_EVERY_S", 0.0)
    Handed(tmp_path / "t.json", "online").handed_over("000", 5)
    assert count(Handed(tmp_path / "t.json", "online"), "000", 6) == [False] * 5 + [True]


def test_a_damaged_file_is_no_memory(tmp_path):
    for content in ("{", "[]", '{"online": 3}', '{"online": {"events": [], "curves": {"x": "y"}}}'):
        (tmp_path / "t.json").write_text(content)
        handed = Handed(tmp_path / "t.json", "online")
        assert handed.is_new("000")
        assert handed.is_new_point("x", 0)
