"""What holds for every generation engine, in a world of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_dist.sampling import Sampling
from tests.engines.world import World
from tests.generation import rank
from tests.tiny import save_llama

SHORT = [[1, 5, 9], [1, 7], [4, 4, 4, 8, 20, 11]]
LONG = [[1, *range(4, 40), *range(4, 44), *range(4, 44), 5, 6], [1, *range(4, 40), *range(4, 44), *range(4, 44), 7]]
SAMPLING = Sampling(n=2, temperature=0.8, max_tokens=12)
SEEDS = [11, 12, 13, 14, 15, 16]
ENGINES = ["vllm", "transformers"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by name. Heads of 32: the smallest vLLM's CPU attention has."""
    return {
        name: save_llama(tmp_path_factory.mktemp(name), tied=name == "tied", hidden=128) for name in ("tied", "untied")
    }


@pytest.fixture(scope="module")
def generation_world1() -> Iterator[World]:
    world = World(1)
    yield world
    world.close()


class Single:
    """The one rank of a world, without lists around every result."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return lambda *args, **kwargs: self._world.run(_call, name, args, kwargs)[0]


def _call(name: str, args: tuple, kwargs: dict):  # type: ignore[no-untyped-def, type-arg]
    return getattr(rank, name)(*args, **kwargs)


@pytest.fixture(scope="module", params=[(e, m) for e in ENGINES for m in ("tied", "untied")], ids="-".join)
def engine(
    request: pytest.FixtureRequest, generation_world1: World, folders: dict[str, Path]
) -> Iterator[tuple[str, Single]]:
    kind, model = request.param
    single = Single(generation_world1)
    single.open_engine(kind, folders[model])
    # Here, so that it holds whichever test runs first: nothing is generated before the first sync.
    assert "StaleWeights" in single.generate(SHORT, SAMPLING, SEEDS)
    single.sync(1, 1)
    yield kind, single
    single.close_engine()


def test_log_probs_are_those_of_the_weights_last_synced(engine: tuple[str, Single]) -> None:
    _, one = engine
    for version, seed in ((2, 21), (3, 22)):
        report = one.sync(version, seed)
        assert report["version"] == version and report["parameters"] in (20, 21)
        for prompts in (SHORT, LONG, LONG):  # long ones twice: the second time out of the prefix cache
            answers = one.generate(prompts, SAMPLING, SEEDS[: 2 * len(prompts)])
            assert len(answers) == 2 * len(prompts)
            assert one.largest_difference(seed, prompts, answers, SAMPLING) < 1e-4
            assert one.largest_difference(seed + 50, prompts, answers, SAMPLING) > 0.1  # and of no others


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=3, temperature=1.3), Sampling(top_p=0.5), Sampling(greedy=True, temperature=0.7)],
    ids=["top_k", "top_p", "greedy"],
)
def test_log_probs_cover_the_full_vocabulary_however_tokens_are_chosen(
    engine: tuple[str, Single], sampling: Sampling
) -> None:
    _, one = engine
    one.sync(1, 1)
    few = Sampling(**{**vars(sampling), "max_tokens": 8})
    assert one.largest_difference(1, SHORT, one.generate(SHORT, few, SEEDS[:3]), few) < 1e-4


def test_greedy_does_not_depend_on_seeds_and_sampling_does(engine: tuple[str, Single]) -> None:
    _, one = engine
    one.sync(1, 1)
    greedy, drawn = Sampling(greedy=True, max_tokens=8), Sampling(max_tokens=8)
    assert one.generate(SHORT, greedy, [1, 2, 3]) == one.generate(SHORT, greedy, [4, 5, 6])
    assert one.generate(SHORT, drawn, [1, 2, 3]) != one.generate(SHORT, drawn, [4, 5, 6])
    # Seeds that differ in the high half only are different seeds.
    assert one.generate(SHORT, drawn, [1, 2, 3]) != one.generate(SHORT, drawn, [s + (1 << 40) for s in (1, 2, 3)])


def test_a_response_depends_on_its_seed_and_not_on_its_batch(engine: tuple[str, Single]) -> None:
    _, one = engine
    one.sync(1, 1)
    together = one.generate(SHORT, SAMPLING, SEEDS)
    assert [tokens for tokens, _, _ in together] == [t for t, _, _ in one.generate(SHORT, SAMPLING, SEEDS)]
    single = Sampling(temperature=0.8, max_tokens=12)
    for place in (5, 0, 3):
        [(tokens, _, _)] = one.generate([SHORT[place // 2]], single, [SEEDS[place]])
        assert tokens == together[place][0]


def test_requests_come_and_go_and_each_is_drawn_as_if_it_were_alone(engine: tuple[str, Single]) -> None:
    _, one = engine
    one.sync(1, 1)
    wave = one.generate(SHORT + LONG, SAMPLING, [*SEEDS, 17, 18, 19, 20])
    answers, so_far, refused = one.by_request(SHORT + LONG, SAMPLING, [*SEEDS, 17, 18, 19, 20])
    assert [(tokens, finished) for tokens, _, finished in answers] == [(t, finished) for t, _, finished in wave]
    assert one.largest_difference(1, SHORT + LONG, answers, SAMPLING) < 1e-4
    assert so_far == wave[0][0][:3], "the same request, let go of after three tokens"
    assert "no requests in flight to take weights" in refused
    after = one.generate(SHORT, SAMPLING, SEEDS)
    assert [tokens for tokens, _, _ in after] == [tokens for tokens, _, _ in wave[: len(SEEDS)]], (
        "nothing is left of it"
    )


def test_each_response_is_told_of_once_and_as_it_is_returned(engine: tuple[str, Single]) -> None:
    _, one = engine
    one.sync(1, 1)
    sampling = Sampling(n=40, temperature=2.0, max_tokens=12)  # some end early
    places, same = one.told_of(SHORT, sampling, list(range(120)), 6)
    assert places == 2 * list(range(120)) and same


def test_responses_end_with_the_end_token_or_at_the_limit(engine: tuple[str, Single]) -> None:
    _, one = engine
    one.sync(1, 1)
    answers = one.generate(SHORT, Sampling(n=40, temperature=2.0, max_tokens=12), list(range(120)))
    assert {finished for _, _, finished in answers} == {True, False}
    for tokens, log_probs, finished in answers:
        assert len(tokens) == len(log_probs)
        assert tokens.index(2) == len(tokens) - 1 if finished else (len(tokens) == 12 and 2 not in tokens)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("corrupted", "checksums must equal the sender's (1 parameters: model.layers.1.self_attn.k_proj.weight)"),
        ("missing", "every announced parameter must arrive (1 parameters: model.layers.1.self_attn.k_proj.weight)"),
        ("nothing", "at least one parameter must arrive, got none"),
        ("unknown", "only announced parameters may arrive (1 parameters: model.layers.1.self_attn.k_proj.scale)"),
        ("dtype", "parameters must arrive as torch.float32 (1 parameters: model.layers.1.self_attn.k_proj.weight)"),
        ("unannounced", "the model must be written completely"),
        ("sender", "the gather timed out"),
    ],
)
def test_a_failed_sync_stops_generation_until_one_succeeds(engine: tuple[str, Single], fault: str, says: str) -> None:
    _, one = engine
    one.sync(1, 1)
    failed = one.sync(7, 21, fault)
    assert failed["error"] == "WeightSyncError" and failed["version"] == -1
    assert "version 7" in failed["message"] and says in failed["message"].replace("vLLM's model", "the model")
    refused = one.generate(SHORT, SAMPLING, SEEDS)
    assert isinstance(refused, str) and refused.startswith("StaleWeights") and "version 7" in refused
    assert one.sync(8, 21)["version"] == 8
    answers = one.generate(SHORT, SAMPLING, SEEDS)
    assert one.largest_difference(21, SHORT, answers, SAMPLING) < 1e-4


def test_kernels_that_were_not_packed_again_fail_the_sync(engine: tuple[str, Single]) -> None:
    kind, one = engine
    if kind != "vllm":
        pytest.skip("only vLLM packs its weights")
    failed = one.sync_without_packing(9, 21)
    assert failed["error"] == "WeightSyncError" and "lm_head" in failed["message"]
    assert "StaleWeights" in one.generate(SHORT, SAMPLING, SEEDS)


def test_requests_that_do_not_fit_are_refused_with_the_rule(engine: tuple[str, Single]) -> None:
    _, one = engine
    one.sync(1, 1)
    assert "one seed per response" in one.generate(SHORT, SAMPLING, SEEDS[:-1])
    assert "prompts must have 1..200 tokens" in one.generate([[5] * 201], Sampling(max_tokens=4), [0])
    assert "prompts must have 1..200 tokens" in one.generate([[]], Sampling(max_tokens=4), [0])
    assert "max_tokens must be <= rollout.max_response_tokens (12), got 13" in one.generate(
        SHORT, Sampling(max_tokens=13), SEEDS[:3]
    )
    assert one.generate([], SAMPLING, []) == []


def test_generating_leaves_the_trainers_random_stream_alone(engine: tuple[str, Single]) -> None:
    _, one = engine
    one.sync(1, 1)
    one.seed_random_stream(5)
    wanted = one.random_stream()
    one.seed_random_stream(5)
    one.generate(SHORT, SAMPLING, SEEDS)
    assert one.random_stream() == wanted


def test_sleep_refuses_and_wake_remembers(engine: tuple[str, Single]) -> None:
    _, one = engine
    one.sync(1, 1)
    before = one.generate(SHORT, SAMPLING, SEEDS)
    asleep, after = one.sleep_then(SHORT, SAMPLING, SEEDS)
    assert "awake" in asleep and after == before


def test_a_kernel_for_each_request_only_where_its_stream_is_promised(
    generation_world1: World, folders: dict[str, Path]
) -> None:
    one = Single(generation_world1)
    one.open_engine("vllm", folders["tied"])
    one.sync(1, 33)
    rows = len(SHORT) * SAMPLING.n
    calls, tokens, differ = one.random_launches(SHORT, SAMPLING, SEEDS, False)
    assert rows < calls <= rows * tokens and differ
    alone = [one.random_launches(SHORT, SAMPLING, SEEDS, True) for _ in range(2)]
    assert alone[0] == alone[1] and alone[0][0] <= alone[0][1] and alone[0][2], "one for all requests, each token"
    assert one.eager_on("cpu") and not one.eager_on("cuda"), "graphs are kept where there are any"
    assert one.random_launches(SHORT, Sampling(greedy=True, max_tokens=4, n=SAMPLING.n), SEEDS, False)[0] == 0
    one.close_engine()


def test_both_engines_agree_on_greedy_tokens(generation_world1: World, folders: dict[str, Path]) -> None:
    one, greedy, answers = Single(generation_world1), Sampling(greedy=True, max_tokens=12), []
    for kind in ENGINES:
        one.open_engine(kind, folders["tied"])
        one.sync(1, 33)
        answers.append([tokens for tokens, _, _ in one.generate(SHORT + LONG, greedy, [0] * 5)])
    one.close_engine()
    assert answers[0] == answers[1]


def test_closing_an_engine_leaves_the_process_group_working(generation_world1: World, folders: dict[str, Path]) -> None:
    one = Single(generation_world1)
    one.open_engine("vllm", folders["tied"])
    one.close_engine()
    assert one.group_works() == 1.0
