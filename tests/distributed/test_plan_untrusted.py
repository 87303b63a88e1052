"""A plan that is read back: ids become folders and members seeds, so nothing in it is taken on trust."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from bdl_train.distributed import Resources
from bdl_train.distributed.plan import Plan, plan
from bdl_train.errors import UsageError


def stored(num_members: int = 6) -> dict[str, Any]:
    """The JSON of three stacks of two members."""
    made = plan(
        num_members,
        Resources(4, 1),
        num_workers=2,
        members_per_stack=2,
        cpus_per_stack=1,
        gpus_per_stack=0.5,
    )
    return json.loads(json.dumps(made.to_json(3)))


def first(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda whole: whole["stacks"][0].update({key: value})


def whole(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda of: of.update({key: value})


DAMAGES = {
    "id-climbs": first("id", "../../../tmp/000"),
    "id-absolute": first("id", "/tmp/000"),
    "id-line-end": first("id", "000\n"),
    "id-other-digits": first("id", "٠٠٠"),
    "id-short": first("id", "00"),
    "id-empty": first("id", ""),
    "id-number": first("id", 0),
    "id-twice": first("id", "001"),
    "id-halves-other": first("id", "000c"),
    "members-none": first("members", []),
    "members-text": first("members", "01"),
    "members-number": first("members", 3),
    "members-float": first("members", [0.0, 1.0]),
    "members-bool": first("members", [False, True]),
    "members-lists": first("members", [[0], [1]]),
    "members-missing": first("members", [0]),
    "members-of-another": first("members", [0, 2]),
    "members-twice": first("members", [0, 0]),
    "members-once-more": first("members", [0, 1, 2]),
    "members-negative": first("members", [0, -1]),
    "members-beyond": first("members", [0, 6]),
    "attempt-negative": first("attempt", -1),
    "attempt-text": first("attempt", "0"),
    "attempt-null": first("attempt", None),
    "cpus-none": first("cpus", 0),
    "cpus-half": first("cpus", 0.5),
    "gpus-negative": first("gpus", -0.5),
    "gpus-endless": first("gpus", float("inf")),
    "gpus-nan": first("gpus", float("nan")),
    "gpus-text": first("gpus", "1"),
    "stacks-none": whole("stacks", []),
    "stacks-number": whole("stacks", 3),
    "stacks-of-text": whole("stacks", ["000"]),
    "workers-none": whole("num_workers", 0),
    "workers-text": whole("num_workers", "2"),
    "reasons-numbers": whole("reasons", [1]),
    "reasons-null": whole("reasons", None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_plan_is_refused(damage: Callable[[dict[str, Any]], None]):
    content = stored()
    assert len(Plan.from_json(content, 6).stacks) == 3
    damage(content)
    with pytest.raises(UsageError, match=r"^plan\.json is damaged: "):
        Plan.from_json(content, 6)


@pytest.mark.parametrize("num_members", [5, 7, 1])
def test_a_plan_for_another_number_of_members_is_refused(num_members: int):
    with pytest.raises(UsageError, match=rf"config's {num_members} members"):
        Plan.from_json(stored(), num_members)


@pytest.mark.parametrize("content", [[], 3, "plan", None, {}])
def test_what_is_no_plan_is_refused(content: Any):
    with pytest.raises(UsageError, match=r"^plan\.json is damaged: "):
        Plan.from_json(content, 6)


def test_halves_and_long_ids_are_plans_too():
    content = stored()
    for one, name in zip(content["stacks"], ("0012a", "000ab", "000bb"), strict=True):
        one["id"] = name
    assert [task.id for task in Plan.from_json(content, 6).stacks] == ["0012a", "000ab", "000bb"]
