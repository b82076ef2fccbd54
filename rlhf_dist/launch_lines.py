"""What a launch is, said for people beside the plan of a step: passes over the data, models and dtypes."""

from __future__ import annotations

from rlhf_dist.compose import Launch
from rlhf_dist.families import family_line
from rlhf_dist.role_kinds import generation_of, has_training_engine
from rlhf_dist.weights_files import export_dtype, stored_weights


def epoch_lines(launch: Launch) -> list[str]:
    """How many steps the passes over the data are, where these were asked for."""
    data = launch.run.data
    if not launch.epoch_rows:
        return []
    from rlhf_dist.data.of_launch import epoch_source

    more = launch.run.steps * launch.source_rows(epoch_source(launch)) - data.epochs * launch.epoch_rows
    filled = f"; {more} rows of the next pass fill the last step" if more else ""
    return [f"epochs    {data.epochs} of {launch.epoch_rows:,} rows = {launch.run.steps} steps{filled}"]


def model_lines(launch: Launch) -> list[str]:
    """What each role's model is, and in which dtypes it is stored, computed with and exported."""
    lines = []
    for role, settings in launch.used_roles.items():
        model = settings.model
        if model is None:
            continue
        stored, engine = stored_weights(model.path), settings.engine
        what = ["weights drawn at random" if model.init == "random" else f"{stored.dtype or 'unknown'} weights"]
        if stored.parameters and model.init != "random":
            what.insert(0, f"{_count(stored.parameters)} parameters")
        lines.append(f"model     {role}: {model.path} ({', '.join(what)})")
        if has_training_engine(launch, role):
            lines[-1] += f", computes in {engine.dtype}"
        if (rollout := generation_of(launch, role)) is not None:
            lines[-1] += f", generates in {rollout.dtype}"
        if role in launch.learning_roles:
            exported = export_dtype(model.path, engine.export_dtype, engine.dtype)
            how = "trains float32 master weights" if role in launch.dataflow.trained else "written by the recipe"
            lines[-1] += f", {how}, exported as {exported}"
        uses = {
            "zero": engine.name == "deepspeed",
            "tp": engine.tensor_parallel > 1,
            "sp": engine.sequence_parallel > 1,
            "lora": engine.lora is not None,
        }
        lines.append(f"          {family_line(model.path, [use for use, asked in uses.items() if asked])}")
    return lines


def _count(number: int) -> str:
    """A number of parameters for people."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
