"""vLLM in a world of two: two copies (data parallel), and one copy over both ranks (tensor parallel)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_dist.sampling import Sampling
from tests.engines.world import World
from tests.generation import rank
from tests.generation.test_engines import LONG, SAMPLING, SEEDS, SHORT
from tests.tiny import save_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by name. Heads of 32: the smallest vLLM's CPU attention has."""
    return {
        name: save_llama(tmp_path_factory.mktemp(name), tied=name == "tied", hidden=128) for name in ("tied", "untied")
    }


@pytest.fixture(scope="module")
def generation_world2() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_two_copies_draw_what_one_would(generation_world2: World, folders: dict[str, Path], model: str) -> None:
    world = generation_world2
    world.run(rank.open_engine, "vllm", folders[model])
    assert [report["version"] for report in world.run(rank.sync, 1, 1)] == [1, 1]
    everything = world.run(rank.generate, SHORT, SAMPLING, SEEDS)
    assert everything[0] == everything[1]
    shares = world.run(rank.own_share, SHORT, SAMPLING, SEEDS)
    tokens = [[answer[0] for answer in answers] for answers in (everything[0], *shares)]
    assert [*tokens[1][:2], *tokens[2], *tokens[1][2:]] == tokens[0]
    assert [len(share) for share in world.run(rank.own_share, SHORT[:1], SAMPLING, SEEDS[:2])] == [2, 0]
    # The copies are apart: what fails on one does not stop the other.
    assert [report["version"] for report in world.run(rank.sync, 2, 2, "corrupted", 1)] == [2, -1]
    world.run(rank.close_engine)


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_one_copy_over_two_ranks(generation_world2: World, folders: dict[str, Path], model: str) -> None:
    world = generation_world2
    two = {"tensor_parallel": 2}
    world.run(_open, folders[model], two)
    for version, seed in ((1, 1), (2, 21)):
        assert [report["version"] for report in world.run(rank.sync, version, seed)] == [version] * 2
        for prompts in (SHORT, LONG):
            answers = world.run(rank.generate, prompts, SAMPLING, SEEDS[: 2 * len(prompts)])
            assert [a[0] for a in answers[0]] == [a[0] for a in answers[1]]
            assert max(world.run(rank.largest_difference, seed, prompts, answers[0], SAMPLING)) < 1e-4
    assert world.run(rank.generate, [], SAMPLING, []) == [[], []]
    if model == "untied":
        check_episodes(world)
    world.run(rank.close_engine)


def check_episodes(world: World) -> None:
    """The first rank plays them and the other follows: what was drawn is what a wave of each turn draws."""
    played, followed = world.run(rank.episodes, ["1+1=", "2", "33+4="])
    assert followed == [] and [len(turns) for turns in played] == [2, 1, 2], "one turn was let go of"
    for context, seed, drawn in (turn for turns in played for turn in turns):
        sampling = Sampling(max_tokens=len(drawn))
        ours, theirs = world.run(rank.generate, [context], sampling, [seed])
        assert ours[0][0] == theirs[0][0] == drawn


def test_a_rank_that_fails_a_sync_stops_its_whole_copy(generation_world2: World, folders: dict[str, Path]) -> None:
    world = generation_world2
    world.run(_open, folders["untied"], {"tensor_parallel": 2})
    world.run(rank.sync, 1, 1)
    for fault in ("corrupted", "missing"):
        healthy, faulty = world.run(rank.sync, 2, 21, fault, 1)
        assert healthy["version"] == faulty["version"] == -1
        assert "k_proj" in faulty["message"] and "rank 1" in healthy["message"] and "k_proj" in healthy["message"]
        assert all("StaleWeights" in refusal for refusal in world.run(rank.generate, SHORT, SAMPLING, SEEDS))
    assert [report["version"] for report in world.run(rank.sync, 3, 21)] == [3, 3]
    assert len(world.run(rank.generate, SHORT, SAMPLING, SEEDS)[0]) == 6
    world.run(rank.close_engine)


def test_nothing_is_left_in_shared_memory(generation_world2: World, folders: dict[str, Path]) -> None:
    world = generation_world2
    world.run(_open, folders["tied"], {"tensor_parallel": 2})
    world.run(rank.sync, 1, 1)
    assert len(world.run(rank.generate, SHORT, Sampling(max_tokens=4), SEEDS[:3])[0]) == 3
    # Unlinked as soon as both ranks have it mapped: nothing to leave behind even when a rank is killed.
    assert world.run(rank.shared_memory_names) == [[], []]
    world.run(rank.close_engine)
    assert world.run(rank.shared_memory_names) == [[], []]
    assert world.run(rank.group_works) == [2.0, 2.0]


def test_the_process_leaves_no_shared_memory_and_no_child(folders: dict[str, Path]) -> None:
    world = World(2)
    try:
        world.run(_open, folders["tied"], {"tensor_parallel": 2})
        ident = world.run(_identity)[0]
        assert world.run(_children) == [[], []]
    finally:
        world.close()  # with the engine open
    assert [name for name in os.listdir("/dev/shm") if ident in name] == []


def _open(folder: Path, rollout: dict[str, int]) -> None:
    rank.open_engine("vllm", folder, **rollout)


def _identity() -> str:
    return os.environ["VLLM_DIST_IDENT"]


def _children() -> list[str]:
    import psutil

    # multiprocessing's own resource tracker belongs to the parent's spawn context.
    return [" ".join(p.cmdline()) for p in psutil.Process().children() if "resource_tracker" not in str(p.cmdline())]
