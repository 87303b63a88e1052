"""The result: best first, the test part labelled."""

from dataclasses import replace

from bdl_train.runs import read_json
from bdl_train.sweeps.ranking import ranked, table, write_report
from bdl_train.sweeps.record import Definition, SweepDir, Trial

DEFINITION = Definition(
    fixed=(),
    axes=("optimizer.lr=1,2,3,4,5",),
    sampler="grid",
    sweep_seed=0,
    objective="val/accuracy",
    direction="maximize",
    prune="none",
    prune_after_trials=4,
    prune_after_epochs=10,
)


def trial(number: int, objective: float | None, **more) -> Trial:
    settings = {
        "status": "complete",
        "metrics": {"val/accuracy": objective, "test/accuracy": 0.5, "other": 1.0},
    }
    return Trial(
        number=number,
        words=(f"optimizer.lr={number}",),
        run=f"r{number}",
        objective=objective,
        **{**settings, **more},
    )


TRIALS = [
    trial(0, 0.2),
    trial(1, None, status="pruned", reason="late", metrics=None),
    trial(2, 0.9, status="partial"),
    trial(3, None),
    trial(4, 0.4),
]


def test_the_best_comes_first_and_what_has_no_result_last():
    assert [one.number for one in ranked(TRIALS, "maximize")] == [2, 4, 0, 1, 3]
    assert [one.number for one in ranked(TRIALS, "minimize")] == [0, 4, 2, 1, 3]
    # Whatever it scored before it was pruned.
    assert ranked([trial(0, 0.99, status="pruned"), trial(1, 0.1)], "maximize")[0].number == 1


def test_the_test_part_is_starred_and_chooses_nothing():
    header, rows = table(DEFINITION, TRIALS)
    assert header == ["trial", "optimizer.lr", "val/accuracy", "status", "test/accuracy *", "run"]
    assert rows[0] == ["0", "0", "0.2", "complete", "0.5", "r0"]
    assert rows[1] == ["1", "1", "–", "pruned", "–", "r1"]
    swapped = [replace(one, metrics={"test/accuracy": float(one.number)}) for one in TRIALS]
    assert [one.number for one in ranked(swapped, "maximize")] == [
        one.number for one in ranked(TRIALS, "maximize")
    ]


def test_long_numbers_are_shortened_and_other_values_are_not():
    words = ("optimizer.lr=0.0035752493931516653", "model.width=1000000", "data.path='/a/b/c.csv'")
    _, (row,) = table(DEFINITION, [replace(TRIALS[0], words=words)])
    assert row[1:4] == ["0.003575", "1e+06", "'/a/b/c.csv'"]


def test_the_report_says_what_was_not_used(tmp_path):
    folder = SweepDir(tmp_path)
    write_report(folder, DEFINITION, ranked(TRIALS, "maximize"))
    text = folder.report.read_text()
    assert text.index("| 2 |") < text.index("| 4 |") < text.index("| 0 |")
    assert "not used for selection" in text
    assert "- trial 1 pruned: late" in text
    stored = read_json(folder.results)
    assert [one["number"] for one in stored["trials"]] == [2, 4, 0, 1, 3]
    assert stored["trials"][0]["val"] == {"val/accuracy": 0.9}
    assert stored["trials"][0]["test (not used for selection)"] == {"test/accuracy": 0.5}
