"""Shapes, memory and costs against numbers worked out by hand or published."""

from __future__ import annotations

import json
from bisect import bisect
from itertools import accumulate
from pathlib import Path
from random import Random

import pytest

from rlhf_dist.hardware import parse_cluster
from rlhf_dist.model_specs import BUILT_IN, model_spec
from rlhf_dist.planner.collectives import Fabric
from rlhf_dist.planner.efficiency import Efficiency
from rlhf_dist.planner.generation import generation_cost
from rlhf_dist.planner.latency import training_variants
from rlhf_dist.planner.memory import gradient_bytes, kv_bytes_per_token, resting_bytes
from rlhf_dist.planner.rates import Machine
from rlhf_dist.planner.strategy import Generation, Strategy
from rlhf_dist.planner.transfer import received_bytes
from rlhf_dist.planner.work import NodeWork
from rlhf_dist.planner.workload import Lengths, Workload
from rlhf_dist.typed import ConfigError

PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "codellama-34b": 33_743_970_304,
}
"""Parameters as the models' safetensors indexes count them."""


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameters_are_those_of_the_published_weights(name: str, parameters: int) -> None:
    assert BUILT_IN[name].parameters == parameters


def test_a_mixture_of_experts_reads_few_experts_for_one_row_and_all_for_many() -> None:
    model = BUILT_IN["qwen3-30b-a3b"]
    assert model.parameters == pytest.approx(30.5e9, rel=0.01) and model.active == pytest.approx(3.0e9, rel=0.03)
    one = model.decode_weights(1)
    assert one == pytest.approx(model.active + model.vocabulary * model.hidden * 0, rel=0.02)
    assert model.decode_weights(2000) == pytest.approx(model.parameters - model.vocabulary * model.hidden, rel=0.01)


def test_a_config_json_gives_the_same_shape(tmp_path: Path) -> None:
    config = {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for value in (str(tmp_path), str(tmp_path / "config.json"), config):
        assert model_spec(value, "models.actor").parameters == BUILT_IN["llama3-8b"].parameters
    tied = model_spec({**config, "tie_word_embeddings": True}, "models.actor")
    assert tied.parameters == BUILT_IN["llama3-8b"].parameters - 128256 * 4096


@pytest.mark.parametrize(
    "missing", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"]
)
def test_a_config_without_a_field_is_named(missing: str) -> None:
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
        "intermediate_size": 128,
    }
    del config[missing]
    with pytest.raises(ConfigError, match=f"models.actor.*lacks {missing}"):
        model_spec(config, "models.actor")


def test_resting_memory_is_that_of_zero() -> None:
    """7.5 B parameters on 64 ranks, the example of ZeRO (Rajbhandari et al. 2020, Fig. 1), gradients in fp32."""
    model = BUILT_IN["llama3-8b"]
    n = model.parameters
    rest = {zero: resting_bytes(model, Strategy(gpus=64, zero=zero), trained=True) for zero in (1, 2, 3)}
    assert rest[1] == {"weights": 2 * n, "optimizer": 12 * n / 64}
    assert rest[3] == {"weights": 2 * n / 64, "optimizer": 12 * n / 64}
    assert gradient_bytes(model, Strategy(gpus=64, zero=1)) == 4 * n
    assert gradient_bytes(model, Strategy(gpus=64, zero=2)) == 4 * n / 64
    assert resting_bytes(model, Strategy(gpus=64, zero=2, offload=True), trained=True)["optimizer"] == 0
    assert resting_bytes(model, Strategy(gpus=8, tp=8, zero=0), trained=False) == {"weights": 2 * n / 8}


def test_keys_and_values_are_repeated_beyond_their_heads() -> None:
    model = BUILT_IN["llama2-70b"]  # 8 key-value heads of 128, 80 layers
    assert kv_bytes_per_token(model, Generation(gpus=8, tp=1)) == 2 * 80 * 8 * 128 * 2
    assert kv_bytes_per_token(model, Generation(gpus=16, tp=16)) == 2 * 80 * 128 * 2


@pytest.mark.parametrize(
    ("source", "target", "received"),
    [
        # HybridFlow, Fig. 8: train 1-4-2, generate 1-2-2-2: a quarter is held, a half is needed.
        (Strategy(gpus=8, tp=4, zero=1), Generation(gpus=8, tp=2), 1 / 2 - 1 / 4),
        (Strategy(gpus=8, tp=4, zero=1), Generation(gpus=8, tp=4), 0.0),
        (Strategy(gpus=8, zero=3), Generation(gpus=8, tp=2), 1 / 2 - 1 / 8),
        (Strategy(gpus=8, tp=8, zero=1), Generation(gpus=8, tp=1), 1 - 1 / 8),
    ],
)
def test_resharding_receives_what_is_missing(source: Strategy, target: Generation, received: float) -> None:
    model = BUILT_IN["llama2-7b"]
    assert received_bytes(model, source, target) == pytest.approx(2 * model.parameters * received)


def test_a_ring_moves_each_byte_once_and_nodes_share_their_network() -> None:
    cluster = parse_cluster("4x8xA100-80G")
    fabric = Fabric.of(cluster, Efficiency())
    network = 25e9 * Efficiency().network
    gathered = fabric.gather_s(1e9, 32)
    assert gathered == pytest.approx(1e9 * 3 / 4 / network, rel=0.01)
    # Eight groups with a GPU on each node share the cards: an eighth each.
    assert fabric.gather_s(1e9, 4, stride=8) == pytest.approx(8 * 1e9 * 3 / 4 / network, rel=0.01)
    assert fabric.gather_s(1e9, 8) == pytest.approx(1e9 * 7 / 8 / (300e9 * Efficiency().link) + fabric.link_latency_s)
    assert fabric.gather_s(1e9, 1) == 0.0


def test_training_takes_its_flops_where_nothing_is_sent() -> None:
    model, cluster = BUILT_IN["llama2-7b"], parse_cluster("1xH200")
    load = Workload(prompts=8, prompt=Lengths.fixed(1024), response=Lengths.fixed(1024))
    work = NodeWork(name="a", phase="train", role="a", rows=8, prompts=8)
    machine = Machine.of(cluster, Efficiency())
    cost = training_variants(model, work, load, Strategy(gpus=1, zero=1), machine)[-1][1]
    flops = 3 * model.forward_flops(8 * 2048, 8 * 2048**2)
    assert cost.parts["compute"] == pytest.approx(flops / (989e12 * cluster.gpu.matmul_efficiency), rel=0.03)
    assert cost.parts["zero"] == 0 and not cost.recompute


def test_decode_steps_get_cheaper_as_rows_finish() -> None:
    model, machine = BUILT_IN["llama3-8b"], Machine.of(parse_cluster("1xH100"), Efficiency())
    work = NodeWork(name="g", phase="generate", role="a", rows=64, prompts=64)

    def seconds(response: Lengths) -> float:
        load = Workload(prompts=64, prompt=Lengths.fixed(256), response=response)
        cost = generation_cost(model, work, load, Generation(gpus=1), machine, 60e9)
        assert cost is not None
        return cost.seconds

    same, spread = seconds(Lengths.fixed(1024)), seconds(Lengths((128.0,) * 7 + (1024.0,)))
    assert seconds(Lengths.fixed(128)) < spread < same, "the longest row sets the steps, the others what they cost"


def test_less_memory_means_fewer_rows_at_a_time_and_more_time() -> None:
    model, machine = BUILT_IN["llama2-13b"], Machine.of(parse_cluster("1xA100-80G"), Efficiency())
    work = NodeWork(name="g", phase="generate", role="a", rows=64, prompts=64)
    load = Workload(prompts=64, prompt=Lengths.fixed(1024), response=Lengths.fixed(1024))
    found = [
        generation_cost(model, work, load, Generation(gpus=1), machine, budget) for budget in (70e9, 40e9, 29e9, 20e9)
    ]
    assert found[3] is None, "26 GB of weights alone"
    seconds = [cost.seconds for cost in found[:3] if cost is not None]
    assert seconds == sorted(seconds) and len(set(seconds)) == 3


def test_a_lognormal_keeps_its_mean_and_its_limit() -> None:
    for mean, limit in ((800, 8192), (3300, 4096), (100, 100_000)):
        lengths = Lengths.lognormal(mean, limit)
        assert lengths.mean == pytest.approx(mean) and lengths.longest == limit
        assert sum(lengths.shares) == pytest.approx(1.0)
        assert sum(steps * alive for _, steps, alive in lengths.alive(512)) == pytest.approx(mean)


def test_the_more_rows_the_longer_the_longest_of_them() -> None:
    lengths = Lengths.lognormal(800, 8192, endless=0.0)
    assert lengths.expected_longest(1) == pytest.approx(800)
    found = [lengths.expected_longest(rows) for rows in (16, 256, 4096)]
    assert 800 < found[0] < found[1] < found[2] <= 8192
    drawn = Random(1)
    ends = list(accumulate(lengths.shares))
    longest = [
        max(lengths.values[min(bisect(ends, drawn.random()), len(ends) - 1)] for _ in range(256)) for _ in range(400)
    ]
    assert found[1] == pytest.approx(sum(longest) / 400, rel=0.05), "as drawing 256 lengths 400 times gives"
    assert Lengths.lognormal(800, 8192, endless=0.01).expected_longest(1024) > 8190, "some row never ends"


def test_latent_attention_and_dense_layers_are_counted_as_published() -> None:
    """DeepSeek-V3's report: 671B parameters, 37B active, 70 kB of keys and values for a token."""
    config = {
        "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "vocab_size": 129280,
        "intermediate_size": 18432, "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "n_shared_experts": 1, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    }  # fmt: skip
    model = model_spec(config, "models.actor")
    assert model.parameters == pytest.approx(671.03e9, rel=1e-4) and model.active == pytest.approx(37e9, rel=0.02)
    assert model.kv_bytes_per_token() == 70_272
    assert kv_bytes_per_token(model, Generation(gpus=8, tp=8)) == 70_272, "every tp rank keeps it all"
