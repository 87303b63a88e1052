import logging

from bdl_train.build import build
from bdl_train.events import EventWriter
from bdl_train.runs import RunDir
from bdl_train.tracking import Follower, Tracker


def no_tracker() -> Tracker:
    return build({"_target_": "bdl_train.tracking.none.NoTracker"}, Tracker, key="tracking")


class Recorder(Tracker):
    def __init__(self):
        self.seen = []

    def start(self, run, config):
        self.seen.append("start")

    def past(self, stack, event):
        self.seen.append(("past", stack, event["value"]))

    def event(self, stack, event):
        self.seen.append((stack, event["value"]))

    def finish(self, status, metrics):
        self.seen.append(status)


class Broken(Recorder):
    def event(self, stack, event):
        super().event(stack, event)
        raise ValueError("cannot draw")


def write(run, stack, value):
    writer = EventWriter(run.stack(stack) / "events.jsonl")
    writer.write("x", [(None, value)], step=1)
    writer.close()


def test_events_reach_every_listener_once_and_a_broken_one_is_heard_no_more(tmp_path, caplog):
    run, good, broken = RunDir(tmp_path), Recorder(), Broken()
    write(run, "000", 1)
    follower = Follower(run, [no_tracker(), broken, good])
    follower.start({})
    write(run, "000", 2)
    write(run, "001", 3)
    with caplog.at_level(logging.WARNING):
        follower.tick()
        follower.tick()
    follower.finish("complete", {})
    assert good.seen == ["start", ("past", "000", 1), ("000", 2), ("001", 3), "complete"]
    assert broken.seen == ["start", ("past", "000", 1), ("000", 2)]
    assert caplog.text.count("cannot draw") == 1
