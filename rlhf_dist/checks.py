"""Everything that can be known to be wrong before a process starts, and the plan of a step for people.

Each check reads settings, small files and the graph; none imports torch, ray or vllm. A check that
fails raises ConfigError with the key, the value, the rule and the next step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_dist.auto_settings import machine_lines, settle
from rlhf_dist.beside_checks import beside_lines, check_evaluation, check_pieces
from rlhf_dist.compose import Launch
from rlhf_dist.config import LanguageModelConfig, ModelConfig, RewardConfig, SourceConfig
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.dataflow.host import HostOp
from rlhf_dist.dataflow.row_facts import Amount, amounts, rows_per_group
from rlhf_dist.dataflow.token_makers import reads_others_tokens
from rlhf_dist.engine_checks import check_engines
from rlhf_dist.generation_checks import check_episodes, check_generation, check_templates
from rlhf_dist.held_out import held_out_fields
from rlhf_dist.launch_lines import epoch_lines, model_lines
from rlhf_dist.looking_checks import check_looking
from rlhf_dist.machine import described_machine, local_machine
from rlhf_dist.machine_settings import device_of
from rlhf_dist.model_folder import ModelShape, check_head, read_shape
from rlhf_dist.output_checks import check_outputs
from rlhf_dist.placement.roles import HOST_POOL, check_staleness, pool_size, rollout_of
from rlhf_dist.reward_checks import check_rewards
from rlhf_dist.role_kinds import generation_of, kind_of
from rlhf_dist.secret_settings import check_no_secrets, check_set_here
from rlhf_dist.slot_checks import check_cluster, check_slots
from rlhf_dist.typed import ConfigError
from rlhf_dist.weight_checks import check_weights

if TYPE_CHECKING:
    from rlhf_dist.hardware import Cluster

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's CPU attention takes (vllm 0.32, v1/attention/backends/cpu_attn.py)."""


def check_one_origin(launch: Launch) -> None:
    """What can be said of sources without their files. Raises ConfigError for one with rows from two places."""
    for where, source, _ in _sources(launch):
        if source.path is not None and source.generator is not None:
            raise ConfigError(
                f"{where} has both a path ({source.path}) and a generator ({source.generator}), which a task sets; "
                f"set task=none to leave the task's rows and reward out, or {where}.generator=null"
            )


def check_launch(launch: Launch, cluster: Cluster | None = None) -> list[str]:
    """The plan of a step, as lines for people. Raises ConfigError (or another ValueError) for what cannot run.

    cluster: one that is described and not there. Models then need no weights and no tokenizer, and may be shapes.
    """
    if cluster is not None:
        launch = settle(launch, described_machine(cluster))
    _check_numbers(launch)
    _check_name(launch)
    _check_tracker(launch)
    check_looking(launch)
    check_no_secrets(launch.run.ray.worker_env, launch.run.output.store_options)
    if cluster is None:
        check_set_here(launch.run.ray.worker_env)
    check_rewards(launch, here=cluster is None)
    check_weights(launch)
    shapes = {
        role: _shape(model, f"{role}.model.path", cluster is not None)
        for role, settings in launch.used_roles.items()
        if (model := settings.model) is not None
    }
    if cluster is None:
        _check_heads(launch)
    pools = launch.placed
    check_staleness(launch.run.placement, pools, launch.dataflow.facts)
    sizes = {
        name: pool_size(launch.run.placement, name)
        for name in launch.run.placement.pools
        if any(at == name and role.split(".")[0] in launch.used_roles for role, at in pools.items())
    }
    if cluster is None:
        check_slots(launch, sizes)
    else:
        check_cluster(launch, sizes, cluster)
    check_outputs(launch, shapes)
    check_engines(launch, shapes, {role: sizes[pool] for role, pool in pools.items() if pool in sizes})
    _check_rollout(launch, shapes, pools, sizes)
    check_generation(launch, pools)
    check_evaluation(launch, pools)
    check_pieces(launch, pools)
    _check_lengths(launch, shapes)
    rows = rows_of_nodes(launch)
    _check_groups(launch)
    check_episodes(launch, _amounts(launch))
    _check_mini_batches(launch)
    if cluster is None or _has_tokenizers(launch):
        _check_vocabularies(launch)
        check_templates(launch)
        sources = _check_sources(launch)
    else:
        sources = ["not read: a model has no tokenizer here"]
    return _plan(launch, pools, sizes, rows, sources)


# --- settings by themselves --------------------------------------------------------------------------------
def _check_numbers(launch: Launch) -> None:
    run = launch.run
    at_least: dict[str, tuple[float, float]] = {
        "steps": (run.steps, 1),
        "data.prompts_per_step": (run.data.prompts_per_step, 1),
        "data.max_prompt_tokens": (run.data.max_prompt_tokens, 1),
        "data.max_response_tokens": (run.data.max_response_tokens, 1),
        "data.epochs": (run.data.epochs, 0),
        "placement.host_processes": (run.placement.host_processes, 1),
        "placement.slots": (run.placement.slots, 0),
        "ray.object_store_bytes": (run.ray.object_store_bytes, 80 << 20),  # Ray's own lower limit is about 75 MiB.
        **{f"recovery.{name}": (value, 0) for name, value in vars(run.recovery).items()},
        "recovery.window_steps": (run.recovery.window_steps, 1),
        **{f"output.{name}": (value, 0) for name, value in vars(run.output).items() if type(value) is int},
        **{f"placement.pools.{name}.slots": (pool.slots, 0) for name, pool in run.placement.pools.items()},
        **{f"placement.pools.{name}.nodes": (pool.nodes, 0) for name, pool in run.placement.pools.items()},
    }
    above_zero = {"ray.ready_timeout_s": run.ray.ready_timeout_s, "ray.call_timeout_s": run.ray.call_timeout_s}
    for role, settings in launch.roles.items():
        at_least[f"{role}.engine.micro_batch_tokens"] = (settings.engine.micro_batch_tokens, 1)
        at_least[f"{role}.engine.logit_chunk_tokens"] = (settings.engine.logit_chunk_tokens, 1)
        if isinstance(settings, RewardConfig):
            above_zero[f"{role}.timeout_s"] = settings.timeout_s
            at_least[f"{role}.concurrency"] = (settings.concurrency, 1)
            at_least[f"{role}.memory_bytes"] = (settings.memory_bytes, 256 << 20)  # Python with numpy takes 100 MiB.
        optimizer = getattr(settings, "optimizer", None)
        if optimizer is not None:
            for name in ("lr", "warmup_steps", "total_steps", "min_lr_ratio", "weight_decay", "grad_clip"):
                at_least[f"{role}.optimizer.{name}"] = (getattr(optimizer, name), 0)
            above_zero[f"{role}.optimizer.eps"] = optimizer.eps
            if optimizer.schedule != "constant":
                at_least[f"{role}.optimizer.total_steps"] = (optimizer.total_steps, optimizer.warmup_steps + 1)
        if (rollout := generation_of(launch, role)) is not None:
            for name in ("tensor_parallel", "max_prompt_tokens", "max_response_tokens"):
                at_least[f"{role}.rollout.{name}"] = (getattr(rollout, name), 1)
            if rollout.bucket_bytes is not None:
                at_least[f"{role}.rollout.bucket_bytes"] = (rollout.bucket_bytes, 1)
            at_least[f"{role}.rollout.top_k"] = (rollout.top_k, 0)
            at_least[f"{role}.rollout.kv_cache_bytes"] = (rollout.kv_cache_bytes or 0, 0)
            at_least[f"{role}.rollout.ratio_tolerance"] = (rollout.ratio_tolerance, 0)
            at_least[f"{role}.rollout.canary_tolerance"] = (rollout.canary_tolerance, 0)
            above_zero[f"{role}.rollout.temperature"] = rollout.temperature
            above_zero[f"{role}.rollout.top_p"] = rollout.top_p
            if rollout.top_p > 1:
                raise ConfigError(
                    f"{role}.rollout.top_p must be at most 1 (the whole vocabulary), got {rollout.top_p:g}"
                )
    for key, (value, least) in at_least.items():
        if not value >= least:
            raise ConfigError(f"{key} must be at least {least:g}, got {value:g}")
    for key, value in above_zero.items():
        if not value > 0:
            raise ConfigError(f"{key} must be above 0, got {value:g}")


def _check_name(launch: Launch) -> None:
    name = launch.run.name
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise ConfigError(f"name must be a plain folder name, got {name!r}")


OWN_EXTRA = ("trackio", "swanlab")
"""Trackers whose packages are an extra of their own."""


def _check_tracker(launch: Launch) -> None:
    package = launch.run.output.tracker
    if package != "none" and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"output.tracker={package} needs a package that is not installed; run pip install "
            f"'rlhf-dist[{package if package in OWN_EXTRA else 'tracking'}]', or set output.tracker=none"
        )


# --- settings against the machine and the model --------------------------------------------------------------
def _shape(model: ModelConfig, key: str, described: bool) -> ModelShape:
    if not described:
        return read_shape(model.path, key, weights=model.init == "pretrained")
    if Path(model.path).is_dir():
        return read_shape(model.path, key, weights=False)
    from rlhf_dist.model_specs import model_spec

    spec = model_spec(model.path, key)
    return ModelShape(
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_size=None if spec.latent else spec.head_dim,
        max_tokens=None,
        vocabulary=spec.vocabulary,
        labels=1 if spec.scalar_head else 2,
    )


def _has_tokenizers(launch: Launch) -> bool:
    models = [model for settings in launch.used_roles.values() if (model := settings.model) is not None]
    return all((Path(model.path).expanduser() / "tokenizer.json").is_file() for model in models)


def _check_heads(launch: Launch) -> None:
    for role, settings in launch.used_roles.items():
        model, kind = settings.model, kind_of(launch.recipe.roles[role])
        if kind.head == "value" and model is not None and model.init == "pretrained":
            needed = isinstance(settings, RewardConfig) and not launch.dataflow.facts[role].trained
            check_head(model.path, f"{role}.model.path", needed=needed)


def _check_rollout(launch: Launch, shapes: dict[str, ModelShape], pools: dict[str, str], sizes: dict[str, int]) -> None:
    for role in launch.roles:
        rollout, model = generation_of(launch, role), launch.roles[role].model
        if rollout is None or model is None:
            continue
        size, key = rollout.tensor_parallel, f"{role}.rollout.tensor_parallel"
        pool = pools.get(rollout_of(role), pools[role])
        slots = sizes[pool]
        if slots % size:
            raise ConfigError(f"{key} must divide the {slots} slots of pool {pool!r}, got {size}")
        shape = shapes[role]
        config = launch.run.placement.pools[pool]
        on_cpu = device_of(config, launch.machine or local_machine()) == "cpu"
        if launch.run.ray.address is not None and config.device == "auto":
            on_cpu = False  # The cluster may have GPUs; its engines say so where it has none.
        if on_cpu and rollout.engine == "vllm" and rollout.kv_cache_bytes == 0:
            raise ConfigError(f"{role}.rollout.kv_cache_bytes must be above 0 without a GPU, got 0; leave it null")
        if on_cpu and rollout.engine == "vllm" and shape.head_size not in (None, *CPU_HEAD_SIZES):
            raise ConfigError(
                f"{role}.rollout.engine=vllm cannot generate with {model.path} without a GPU: its attention "
                f"heads are {shape.head_size} wide, and vLLM takes {', '.join(map(str, CPU_HEAD_SIZES))} on a CPU; set "
                f"{role}.rollout.engine=transformers"
            )
        for what, count in (("attention heads", shape.heads), ("key-value heads", shape.kv_heads)):
            if count is not None and count % size:
                raise ConfigError(
                    f"{key} must divide the {count} {what} of {model.path}, got {size}; "
                    f"it may be {', '.join(str(n) for n in _divisors(shape, slots))}"
                )


def _divisors(shape: ModelShape, slots: int) -> list[int]:
    counts = [count for count in (slots, shape.heads, shape.kv_heads) if count is not None]
    return [size for size in range(1, slots + 1) if all(count % size == 0 for count in counts)]


def _check_lengths(launch: Launch, shapes: dict[str, ModelShape]) -> None:
    for role, shape in shapes.items():
        tokens, key = max_row_tokens(launch, role)
        if shape.max_tokens is not None and tokens > shape.max_tokens:
            raise ConfigError(
                f"{key} = {tokens} tokens, but the model of {role!r} "
                f"holds {shape.max_tokens} (max_position_embeddings); lower one of them"
            )


def max_row_tokens(launch: Launch, of: str | None = None) -> tuple[int, str]:
    """Longest prompt and response together, tokens, and the settings that say so.

    of: for that role; what another one is asked by templates alone, it does not see.
    """
    seen = [role for role in launch.roles if of in (None, role) or reads_others_tokens(launch.dataflow, role)]
    generation = {f"{role}.rollout": generation_of(launch, role) for role in seen}
    limits = {
        where: (rollout.max_prompt_tokens, rollout.max_response_tokens)
        for where, rollout in generation.items()
        if rollout is not None
    } or {"data": (launch.run.data.max_prompt_tokens, launch.run.data.max_response_tokens)}
    encoding = {node.role for node in launch.dataflow if node.op == "encode"} & set(seen)
    limits |= {
        f"{role}.rollout": (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens)
        for role in encoding
        if isinstance(config := launch.roles[role], LanguageModelConfig)
    }
    where, most = max(limits.items(), key=lambda one: sum(one[1]))
    return sum(most), f"{where}.max_prompt_tokens + {where}.max_response_tokens = {most[0]} + {most[1]}"


# --- rows ------------------------------------------------------------------------------------------------------
def rows_of_nodes(launch: Launch) -> dict[str, tuple[int, bool]]:
    """Node -> (most rows it sees in a step, whether a filter may have dropped some)."""
    return {name: (amount.rows, not amount.exact) for name, amount in _amounts(launch).items()}


def _amounts(launch: Launch) -> dict[str, Amount]:
    for node in launch.dataflow:
        _check_times(node)
    return amounts(launch.dataflow, {name: launch.source_rows(name) for name in launch.recipe.sources})


def _check_groups(launch: Launch) -> None:
    """Refuse an op that compares the rows of a group where a group has too few of them."""
    size: dict[str, int | None] = {}
    for node in launch.dataflow:
        if node.kind == "source":
            size[node.name] = 2 if "label" in node.writes else 1
            continue
        before = size[node.inputs[0].rows] if node.inputs else None
        size[node.name] = before if node.rows == "drop" else rows_per_group(node, before)
        least = node.spec.least_group_for(node.kwargs) if isinstance(node.spec, HostOp) else 1
        if before is not None and before < least:
            setting = "algorithm.samples_per_prompt"
            named = hasattr(launch.algorithm, "samples_per_prompt")
            raise ConfigError(
                f"{node.line}: {node.op} compares the responses to a prompt with each other, which needs at least "
                f"{least} of them, got {before}: it would never teach anything; set "
                f"{setting if named else 'n of generate_sequences in the recipe'} to {least} or more"
            )


def _check_times(node: Node) -> None:
    times = node.kwargs.get("n", 1) if node.rows == "expand" else 1
    if not isinstance(times, int) or times < 1:
        raise ConfigError(f"{node.line}: {node.name} needs n >= 1 responses to a prompt, got {times!r}")


def _updates(launch: Launch) -> Iterator[tuple[Node, int, int]]:
    """Nodes that take optimizer steps, with their mini-batches and epochs."""
    for node in launch.dataflow:
        if "mini_batches" in node.kwargs:
            yield node, node.kwargs["mini_batches"], node.kwargs.get("epochs", 1)


def _check_mini_batches(launch: Launch) -> None:
    rows = _amounts(launch)
    for node, mini_batches, epochs in _updates(launch):
        for name, value in (("mini_batches", mini_batches), ("epochs", epochs)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{node.line}: {node.name} needs {name} >= 1, got {value!r}")
        for entry in node.inputs:
            groups, exact = rows[entry.rows].groups, rows[entry.rows].exact
            if mini_batches <= groups and not (exact and groups % mini_batches):
                continue
            near = [size for size in range(1, groups + 1) if groups % size == 0]
            source = launch.dataflow.source_of(entry.rows)
            own = source is not None and launch.source(source).rows_per_step
            key = f"{launch.source_key(str(source))}.rows_per_step" if own else "data.prompts_per_step"
            if source is None or launch.source_rows(source) != groups:
                key = f"the groups of {entry.rows}"
            raise ConfigError(
                f"{node.line}: {node.name} cuts the step into {mini_batches} mini-batches, which must divide "
                f"{key} = {groups}; it may be {', '.join(map(str, near))}"
            )


def _sources(launch: Launch) -> list[tuple[str, SourceConfig, Mapping[str, str]]]:
    """(settings' key, source, fields of its own) of every source, held-out rows too."""
    recipe, heldout = launch.recipe, launch.run.data.heldout
    found = [(launch.source_key(name), launch.source(name), recipe.source_fields(name)) for name in recipe.sources]
    if heldout is None:
        return found
    return [*found, ("data.heldout", heldout, held_out_fields(recipe, launch.dataflow))]


def _check_sources(launch: Launch) -> list[str]:
    """Lines for people about the data."""
    from rlhf_dist.data import check_source, tokenizer_of

    data, tokenizer, lines = launch.run.data, tokenizer_of(launch), list[str]()
    if tokenizer is not None and not (Path(tokenizer) / "tokenizer.json").is_file():
        raise ConfigError(
            f"{tokenizer} has no tokenizer.json, which the source needs; save it with "
            f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder), which converts older formats"
        )
    check_one_origin(launch)
    for where, source, fields in _sources(launch):
        try:
            lines += check_source(
                source,
                where,
                tokenizer=tokenizer,
                seed=launch.run.seed,
                max_prompt_tokens=data.max_prompt_tokens,
                max_response_tokens=data.max_response_tokens,
                fields=fields,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return lines


def _check_vocabularies(launch: Launch) -> None:
    """All models read the ids of one tokenizer, the source's; one that starts at random may learn any."""
    from rlhf_dist.data.of_launch import tokenizer_role
    from rlhf_dist.data.token_ids import check_vocabulary

    models = {role: model for role, settings in launch.used_roles.items() if (model := settings.model) is not None}
    base = tokenizer_role(launch)
    for role, model in models.items():
        reads = reads_others_tokens(launch.dataflow, role)  # one that is asked by templates may have words of its own
        if base is not None and role != base and reads and model.init == "pretrained":
            check_vocabulary(model.path, f"{role}.model.path", models[base].path, f"{base}.model.path")


# --- the plan ----------------------------------------------------------------------------------------------------
def _plan(
    launch: Launch,
    pools: dict[str, str],
    sizes: dict[str, int],
    rows: dict[str, tuple[int, bool]],
    sources: list[str],
) -> list[str]:
    run = launch.run
    tokens, _ = max_row_tokens(launch)
    most = max((count for count, _ in rows.values()), default=0)
    what = {"preferences": "pairs", "examples": "examples"}
    given = " + ".join(
        f"{launch.source_rows(name)} {what.get(launch.source(name).rows, 'prompts')}" for name in launch.recipe.sources
    )
    lines = [
        f"run       {run.name}: {run.steps} steps of {launch.recipe.name}, seed {run.seed}",
        f"step      {given} -> {most} rows, at most {most * tokens:,} tokens ({tokens} a row)",
        *epoch_lines(launch),
        *(f"data      {line}" for line in sources),
        *model_lines(launch),
        *machine_lines(launch),
    ]
    for node, mini_batches, epochs in _updates(launch):
        lines.append(
            f"learning  {node.role}: {mini_batches} mini-batches x {epochs} epochs = {mini_batches * epochs} "
            f"optimizer steps{_cadence(node)} ({node.op})"
        )
    used = {role: at for role, at in pools.items() if role.split(".")[0] in launch.used_roles}
    for name, pool in run.placement.pools.items():
        if name not in sizes:
            lines.append(f"pool      {name}: not started, no role of this recipe runs there")
            continue
        roles = ", ".join(role for role, at in used.items() if at == name)
        where = f" on {pool.nodes} nodes" if pool.nodes else ""
        lines.append(f"pool      {name}: {sizes[name]} slots{where} ({pool.device}) for {roles}")
    on_host = ", ".join(["sources, host ops", *(role for role, at in used.items() if at == HOST_POOL)])
    lines.append(f"pool      {HOST_POOL}: {run.placement.host_processes} CPU processes for {on_host}")
    for role in launch.dataflow.generating:
        lines.append(f"rollout   {role}: {_freshness(launch, role, pools)}")
    lines += beside_lines(launch, pools)
    width = max(len(node.name) for node in launch.dataflow)
    for number, node in enumerate(launch.dataflow, start=1):
        count, dropped = rows[node.name]
        amount = f"{'up to ' if dropped else ''}{count} rows" if count else "weights"
        lines.append(
            f"{number:>4}      {node.name:<{width}}  {amount:<14} {_where(node, pools)}{_cadence(node)}".rstrip()
        )
    return lines


def _where(node: Node, pools: dict[str, str]) -> str:
    """The pool a node runs on; `from -> to` for a weight transfer between two."""
    apart = pools.get(rollout_of(node.role))
    if others := dict.fromkeys(pools[sender] for sender in node.senders if pools[sender] != pools[node.role]):
        return f"{', '.join(others)} -> {pools[node.role]}"
    if apart is not None and node.kind == "reshard":
        return f"{pools[node.role]} -> {apart}"
    if apart is not None and rollout_of(node.role) in node.weights_read:
        return apart
    return pools.get(node.role, "controller" if node.kind in ("state", "join") else HOST_POOL)


def _freshness(launch: Launch, role: str, pools: dict[str, str]) -> str:
    placement, apart = launch.run.placement, pools.get(rollout_of(role))
    if role in launch.dataflow.written and not launch.dataflow.facts[role].trained:
        return f"in pool {apart or pools[role]}, weights synced after the recipe has written them"
    if not launch.dataflow.facts[role].trained:
        return f"in pool {apart or pools[role]}, with the weights of its model: it never learns"
    if apart is None:
        return "in the training pool, weights synced every step (on-policy)"
    if not placement.max_staleness:
        return f"in pool {apart}, weights synced every step (on-policy)"
    how = "interrupted by" if placement.interrupt else "delays"
    return (
        f"in pool {apart}, runs up to {placement.max_staleness} updates ahead (off-policy); a running "
        f"generation {'is ' if placement.interrupt else ''}{how} a weight sync"
    )


def _cadence(node: Node) -> str:
    every = f", every {node.every} steps" if node.every > 1 else ""
    return every + (f", from step {node.after}" if node.after else "")
