"""Who asks a run for its stacks is answered, whatever became of those who asked before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from controller.cluster import stacks
from controller.cluster.pool import ClusterError, Pool
from controller.execution.simulated_workers import AtOnce


def test_an_error_in_one_answer_is_said_once_and_the_next_has_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = list[int]()

    def pools() -> Mapping[str, Pool]:
        asked.append(1)
        if len(asked) < 3:
            raise RuntimeError("changed while it was read")
        # Asking such a process raises, since it is none.
        return {} if len(asked) == 3 else {"main": Pool("main", (None,), node_ids=("n",))}

    monkeypatch.setattr(stacks, "LOOK_S", 0.01)
    monkeypatch.setattr(stacks, "stacks_of", lambda frames: "half a character: \udce9")
    with stacks.stacks_on_demand(tmp_path, pools, AtOnce()):
        for _ in range(2):
            with pytest.raises(ClusterError, match="has not answered"):
                stacks.ask_for_stacks(tmp_path, 0.2)
        assert "half a character: \\udce9" in stacks.ask_for_stacks(tmp_path, 5.0).read_text()
        assert "the other processes could not be asked" in stacks.ask_for_stacks(tmp_path, 5.0).read_text()
    assert capsys.readouterr().err.count("RuntimeError: changed") == 1
