"""What a sweep shows while it runs."""

from bdl_train.sweeps import view
from bdl_train.sweeps.view import SweepView, TrialLine


def events(step: int):
    yield {"key": "started", "step": 0, "member": None, "value": {"members": [0, 1]}}
    value = {"step": step, "num_steps": 100, "active": 2, "failed": 0, "nll": 0.5}
    yield {"key": "progress", "step": step, "member": None, "value": value}


def test_a_trial_keeps_its_line_and_prints_nothing(capsys):
    line = TrialLine({"000": 2})
    for event in events(40):
        line.event("000", event)
    assert line.text.startswith("0/2 members, step 40/100, NLL 0.5")
    line.finish("complete", {})
    assert line.text == "scoring [complete]"
    assert capsys.readouterr().out == ""


def test_without_a_terminal_the_total_comes_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(view, "PLAIN_EVERY_S", 0.0)
    shown = SweepView()
    shown.start()
    shown.show("1/4 trials", {"trial 1": "step 3"})
    monkeypatch.setattr(view, "PLAIN_EVERY_S", 1000.0)
    shown.show("2/4 trials", {})
    shown.say("trial 1 [x] complete")
    shown.stop()
    assert capsys.readouterr().out == "1/4 trials\ntrial 1 [x] complete\n"


def test_a_terminal_shows_a_line_for_each_trial_and_one_for_all():
    found = view.rows("1/4 trials", {"trial 1": "step 3 " + "x" * 100, "trial 2": "step 4"}, 40)
    assert found == ["trial 1: step 3 " + "x" * 24, "trial 2: step 4", "1/4 trials"]
