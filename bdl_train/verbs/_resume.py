"""Which run a resumed training continues, with which settings, and what may have changed since."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bdl_train.config import Options, override_key
from bdl_train.errors import UsageError
from bdl_train.inference import Method, Setting
from bdl_train.runs import RunDir, read_json
from bdl_train.training.checkpoints import phase_of_checkpoint
from bdl_train.verbs._runs import read_config

RESUMABLE = ("resume", "allow", "tracking", "cluster", "trainer.max_epochs")
"""What may be given beside `resume=`: where the work runs, and a larger budget while no stack has finished."""


WORDS = {"data": "the data (by fingerprint)", "prior_run": "the posterior behind prior.run"}


def resumed_config(config: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """The config of the run that `resume` names, with what the command line may change.

    Raises:
        UsageError: another override, fewer epochs, or more epochs after a stack has finished.
    """
    given = {override_key(text).replace("/", ".") for text in options.overrides}
    for key in sorted(given):
        if not any(key == one or key.startswith(f"{one}.") for one in RESUMABLE):
            raise UsageError(
                f"{key} cannot change when a run is resumed: its config and plan decide. Beside resume=, only "
                f"{', '.join(RESUMABLE[1:])} may be given."
            )
    run = RunDir.open(config["resume"], key="resume")
    stored = read_config(run)
    for group in ("cluster", "tracking"):
        if any(key == group or key.startswith(f"{group}.") for key in given):
            stored[group] = config[group]
    if "trainer.max_epochs" in given:
        stored["trainer"]["max_epochs"] = _longer(run, stored, config["trainer"]["max_epochs"])
    return {
        **stored,
        "resume": config["resume"],
        "allow": config["allow"],
        "plan_only": False,
        "check_prior": False,
    }


def _longer(run: RunDir, stored: Mapping[str, Any], asked: Any) -> Any:
    before = stored["trainer"].get("max_epochs")
    if not isinstance(asked, int) or not isinstance(before, int) or asked == before:
        return asked  # a wrong type is refused where all settings are checked
    if asked < before:
        raise UsageError(
            f"trainer.max_epochs={asked} is below the run's {before}: a resumed run can only train longer."
        )
    finished = [path.parent.name for path in sorted(run.path.glob("stacks/*/result.json"))]
    if finished:
        raise UsageError(
            f"trainer.max_epochs={asked}: {len(finished)} stacks of {run.path} have finished their {before} epochs and "
            "kept no optimiser state to go on from, so members would differ in length. Start a new run for more epochs."
        )
    return asked


def check_longer(run: RunDir, method: Method[Any], setting: Setting) -> None:
    """Refuse more epochs that no stack would train: those of a phase that one of them has behind it.

    Args:
        run: The run to resume; its config is still that of before.
        method: Of the run.
        setting: With the epochs that are asked for.

    Raises:
        UsageError: the longer phase, and the stack.
    """
    before = replace(setting, num_epochs=read_config(run)["trainer"]["max_epochs"])
    both = list(zip(method.phases(before), method.phases(setting), strict=False))
    longer = next((at for at, (old, new) in enumerate(both) if old.num_steps != new.num_steps), len(both))
    for folder in sorted((run.path / "stacks").glob("*")):
        phase = phase_of_checkpoint(folder) if longer < len(both) else None
        if phase is not None and phase > longer:
            raise UsageError(
                f"trainer.max_epochs={setting.num_epochs} makes the phase '{both[longer][0].name}' longer, which stack "
                f"{folder.name} of {run.path} has behind it: these epochs would not be trained. Resume it without "
                "trainer.max_epochs, or start a new run."
            )


def check_unchanged(run: RunDir, inputs: Mapping[str, Any]) -> None:
    """Refuse to mix members that saw different data or priors.

    Args:
        run: The run to resume.
        inputs: What goes into the run today, as `plan.json` recorded it when it began.

    Raises:
        UsageError: the data or the earlier run behind the prior are not the same any more.
    """
    stored = read_json(run.plan)
    recorded = stored.get("inputs") if isinstance(stored, dict) else None
    if not isinstance(recorded, dict):
        raise UsageError(f"{run.plan} is damaged: it lacks what the run began with.")
    for name, now in inputs.items():
        before = recorded.get(name)
        if before != now:
            raise UsageError(
                f"resume={run.path}: {WORDS[name]} changed since the run began (plan.json says {before}, now it is "
                f"{now}). Restore what it was, or start a new run."
            )
