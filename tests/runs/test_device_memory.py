"""Four models on one device that holds the largest phase of a step, and not a byte more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.cluster.pool import ClusterError
from controller.record.metrics import read_metrics
from tests.runs.test_recipes import weights
from tests.tiny import save_classifier
from workers.reshard.colocated import ColocatedSync

PPO = ("reward.function=null", "actor.rollout.max_response_tokens=8", "algorithm.mini_batches=2", "steps=3")
PPO += ("output.checkpoint_every=1", "output.evaluate_every=1")  # which use the engines out of the steps' order
USES = ("actor/{}_generate", "actor/{}_forward", "critic/{}_forward", "reference/{}_forward", "reward/{}_forward")
USES += ("critic/{}_update", "actor/{}_update", "actor/{}_sync")


def test_ppo_with_four_models_fits_where_its_largest_phase_fits(
    launch: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = tmp_path / "others.jsonl"
    others.write_text('{"prompt": "7*7=", "answer": "49"}\n{"prompt": "7*8=", "answer": "56"}\n')
    scorer = save_classifier(tmp_path / "scorer")
    settings = (*PPO, f"reward.model.path={scorer}", "placement=colocate", f"data.heldout.path={others}")

    syncs: list[str] = []
    sync = ColocatedSync.run

    def counted(self: ColocatedSync, must_change: bool) -> Any:
        syncs.append(names[-1])
        return sync(self, must_change)

    monkeypatch.setattr(ColocatedSync, "run", counted)
    names: list[str] = []

    def run(name: str, limit: int | None) -> dict[str, float]:
        names.append(name)
        limited = () if limit is None else (f"placement.pools.main.device_bytes={limit}",)
        return launch("ppo", *settings, *limited, f"name={name}", local=True)["last"]

    assert not any("device_bytes" in name for name in run("free", None)), "nothing is watched where nothing is limited"
    wide = run("wide", 1 << 40)
    predicted = {use: wide[use.format("predicted_bytes")] for use in USES}
    assert all(wide[use.format("moved_bytes")] == 0 for use in USES), "everything fits, nothing moves"
    largest = int(max(predicted.values()))
    all_of_it = wide["actor/device_bytes_update"]
    assert largest < 0.6 * all_of_it

    run("tight", largest)
    steps = [row for row in read_metrics(tmp_path / "tight") if "step_s" in row]
    for step in steps:
        assert {use: step[use.format("predicted_bytes")] for use in USES} == predicted
        for use in USES:
            # Gradients and buckets come on top of what is there when a phase begins.
            there = step[use.format("device_bytes")]
            assert there <= largest and (use not in USES[:5] or there >= predicted[use])
        assert step["actor/moved_bytes_per_s_update"] > 0
    once = sum(steps[-1][use.format("moved_bytes")] for use in USES)
    assert 0 < once < 2 * all_of_it, "less than everything away and back"
    assert syncs.count("free") == syncs.count("wide") == 4, "the first and one a step"
    assert syncs.count("tight") > 4, "weights that a checkpoint took the place of came by a sync, not from the host"
    for name in ("wide", "tight"):
        for role in ("actor", "critic"):
            one, other = (weights(tmp_path / way / "models" / role) for way in ("free", name))
            assert len(one) > 10 and all(np.array_equal(one[key], other[key]) for key in one), f"{role}, {name}"

    says = (
        rf"phase actor.update of role 'actor' needs {largest} bytes on every rank's device .*, and .* is {largest - 1}:"
    )
    with pytest.raises(ClusterError, match=says):
        run("short", largest - 1)
