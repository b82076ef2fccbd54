"""What a run's processes must find on their nodes, and how a file that is not there is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.cluster.local import LocalReplies, _Process
from controller.cluster.pool import ClusterError, Pool
from controller.cluster.shared_files import check_files_are_shared
from rlhf_dist.compose import Launch, compose
from rlhf_dist.placement.roles import HOST_POOL
from tests.tiny import save_llama


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """A run whose rows come from two files and a function of the user's."""
    model = save_llama(tmp_path / "model")
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "mine.py").write_text("def row(index): return {'prompt': str(index)}\n")
    mix = f"{{files: {{path: '{tmp_path}/?.jsonl'}}, made: {{generator: '{tmp_path}/mine.py:row'}}}}"
    settings = ["task=none", f"model.path={model}", f"data.train.mix={mix}", f"output.root={tmp_path}"]
    return compose("grpo", [*settings, "reward.function=math:sqrt"])


class Elsewhere(_Process):
    """A worker process on a node that lacks one file, by its name."""

    def __init__(self, lacking: str) -> None:
        super().__init__(HOST_POOL)
        missing = self.worker.missing
        self.worker.missing = lambda files: missing(
            {path + "x" if path.endswith(lacking) else path: size for path, size in files.items()}
        )


def look(launch: Launch, folder: Path, lacking: str, names: tuple[str, ...] = (HOST_POOL, "main")) -> None:
    pools = {name: Pool(name, (Elsewhere(lacking),), node_ids=("node",)) for name in names}
    check_files_are_shared(launch, folder, {"actor": "main"}, pools, LocalReplies(), 5.0)


def test_every_file_that_a_process_reads_is_looked_for(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.process._FRESH_S", 0.0)
    look(launch, tmp_path, "nothing that is read")
    assert not list(tmp_path.glob(".seen*"))
    with pytest.raises(ClusterError, match=r"what data.train reads .* node 127.0.0.1 \(pool 'host', rank 0\) .*b.json"):
        look(launch, tmp_path, "b.jsonl")
    with pytest.raises(ClusterError, match="what data.train reads .*mine.pyx cannot be read: No such file"):
        look(launch, tmp_path, "mine.py")
    with pytest.raises(ClusterError, match="the model whose tokenizer encodes the rows, .*tokenizer.json"):
        look(launch, tmp_path, "tokenizer.json")
    with pytest.raises(ClusterError, match="the model of actor, .*rank 0.*config.json") as refused:
        look(launch, tmp_path, "config.json", ("main",))
    assert "copy it to the same path there" in str(refused.value)


def test_a_file_of_another_size_is_not_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.process._FRESH_S", 0.0)
    (tmp_path / "file").write_text("four")
    process = _Process("main").worker
    assert process.missing({str(tmp_path / "file"): 4}) is None
    assert process.missing({str(tmp_path / "file"): 5}) == (
        "127.0.0.1",
        f"{tmp_path}/file has 4 bytes, and 5 where the run was started",
    )
