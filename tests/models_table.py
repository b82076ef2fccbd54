"""Which model families train exactly, under which engines and splits, and how they generate: docs/models.md.

    python -m tests.models_table [FAMILY ...] [--columns fsdp zero tp sp lora vllm]      a JSON line last

About a quarter of an hour; `vllm`, 8 seconds a family more, only where it is asked for.

Every family is a tiny random model (families.py), tried for real; what a family is refused for is what a user would
read. The facts are kept in rlhf_dist/model_families.json, from which `rlhf-dist check` says a family's row; families
and columns that are not asked for stay as they are there, and the page is written anew from all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from tests.engines.world import World
from tests.families import families, tiny_config, tiny_model
from tests.family_check import Verdict, check_training

ROOT = Path(__file__).parents[1]
MADE = "<!-- made by make models-table from here on -->"
PAGE, FACTS = ROOT / "docs" / "models.md", ROOT / "rlhf_dist" / "model_families.json"

ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp": (1, {}),
    "zero": (1, {"name": "deepspeed"}),
    "tp": (2, {"tensor_parallel": 2}),
    "sp": (2, {"sequence_parallel": 2}),
    "lora": (1, {"lora": {"rank": 4}}),
}
"""Column -> ranks and settings of the engine."""


def verdict(family: str, changes: Mapping[str, Any], engine: dict[str, Any]) -> Verdict:
    """On a rank: one family at tiny size, trained for a step. A family that cannot be built is `untried`."""
    import torch.distributed as dist

    try:
        model = tiny_model(tiny_config(family, **changes))
        model(input_ids=torch.arange(3, 9)[None])
    except Exception as error:  # noqa: BLE001 - whatever its config class or model makes of small sizes
        return Verdict(family, "untried", why=f"{type(error).__name__}: {error}".splitlines()[0])
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
        dist.barrier()
        try:
            found = check_training(family, Path(shared[0]), model, **engine)
        except Exception:  # noqa: BLE001 - a riddle is a fault of ours, and named as one
            found = Verdict(family, "wrong", why=traceback.format_exc(limit=-3))
        dist.barrier()
    return found


VLLM = "vllm"
"""Column of generation beside training: weights synced twice, exported, and read by transformers and vLLM."""


def support(family: str) -> dict[str, Any]:
    """On a rank of its own: whether vLLM generates with the family, and weights reach it and its files."""
    from workers.model_support import TOLERANCE, model_support

    with tempfile.TemporaryDirectory() as folder:
        wide = dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim"), 128)
        tiny_model(tiny_config(family, head_dim=32, **wide)).save_pretrained(folder)
        found = model_support(Path(folder), Path(folder) / "out")
    exact = found.vllm != "none" and found.sync != "refused" and max(found.differences, default=1.0) < TOLERANCE
    said = {"state": "exact" if exact else "refused", "way": f"{found.vllm}, {found.sync}", "export": found.export}
    why = " ".join(found.why.split())[:300] or (f"{max(found.differences):.2g} nats off" if found.differences else "")
    return said | ({} if exact else {"why": why})


def supported(family: str) -> dict[str, Any]:
    """`support` in a process that vLLM may end."""
    world = World(1, call_timeout_s=150.0)
    try:
        found: dict[str, Any] = world.run(support, family)[0]
    except (RuntimeError, TimeoutError, EOFError, OSError) as error:
        last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        found = {"state": "refused", "why": last[:300]}
    finally:
        world.close()
    return found


Facts = dict[str, dict[str, dict[str, Any]]]
"""Family -> column -> state (`exact`, `refused`, `wrong`, `untried`), why, way, nats off."""


def one_a_line(facts: Facts) -> str:
    """The facts as JSON that a person can compare: a family is a line."""
    rows = (f"{json.dumps(family)}: {json.dumps(row, sort_keys=True)}" for family, row in sorted(facts.items()))
    return "{\n" + ",\n".join(rows) + "\n}\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*")
    parser.add_argument("--columns", nargs="+", default=list(ENGINES), choices=[*ENGINES, VLLM])
    asked = parser.parse_args()
    facts: Facts = json.loads(FACTS.read_text()) if FACTS.exists() else {}
    sizes = sorted({ENGINES[column][0] for column in asked.columns if column != VLLM})
    worlds = {size: World(size, call_timeout_s=1200.0) for size in sizes}
    try:
        for family in asked.family or families():
            row = facts.setdefault(family, {})
            for column in asked.columns:
                if column != "fsdp" and row.get("fsdp", {}).get("state") != "exact":
                    continue
                if column == VLLM:
                    row[column] = supported(family)
                else:
                    size, engine = ENGINES[column]
                    row[column] = worst(worlds[size].run(verdict, family, {}, engine))
            print(f"{family:24} " + "  ".join(f"{name} {one['state']}" for name, one in row.items()), flush=True)
            FACTS.write_text(one_a_line(facts))
    finally:
        for world in worlds.values():
            world.close()
    PAGE.write_text(page(facts))
    by_state: dict[str, list[str]] = {"exact": [], "refused": [], "wrong": [], "untried": []}
    for family, row in sorted(facts.items()):
        wrong = any(one["state"] == "wrong" for one in row.values())
        by_state["wrong" if wrong else row["fsdp"]["state"]].append(family)
    print(json.dumps(by_state))


def worst(found: list[Verdict]) -> dict[str, Any]:
    """What the ranks say, as facts: the worst of them."""
    order = ("exact", "untried", "refused", "wrong")
    one = max(found, key=lambda verdict: order.index(verdict.state))
    facts = {
        "state": one.state,
        "why": " ".join(one.why.split())[-400 if one.state == "wrong" else 0 :][:400],
        "way": one.way,
        "off": one.difference,
    }
    return {name: value for name, value in facts.items() if value}


def has_experts(family: str) -> bool:
    """The family's default is a mixture of experts."""
    config = CONFIG_MAPPING[family]().get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def page(facts: Facts) -> str:
    """docs/models.md: its prose as it is, and the tables."""
    lines = [
        PAGE.read_text().split(MADE)[0].rstrip(),
        "",
        MADE,
        "",
        f"| family | rows go | {' | '.join(ENGINES)} | vLLM, sync | export | nats off |",
        "|---" * (len(ENGINES) + 5) + "|",
    ]
    for family, row in sorted(facts.items()):
        if row["fsdp"]["state"] == "exact":
            states = [row.get(column, {}).get("state", "untried") for column in ENGINES]
            cells = [{"refused": "no", "untried": ""}.get(state, state) for state in states]
            beside = row.get(VLLM, {})
            served = {"exact": beside.get("way", ""), "refused": "no"}.get(beside.get("state", ""), "")
            cells += [served, beside.get("export", ""), f"{row['fsdp'].get('off', 0):.0e}"]
            name = f"{family} (experts)" if has_experts(family) else family
            lines.append(f"| {name} | {row['fsdp']['way']} | {' | '.join(cells)} |")
    for state, title in (
        ("refused", "Refused by name when the engine is built"),
        ("untried", "Not tried at tiny size"),
    ):
        chosen = [
            (family, row["fsdp"]["why"]) for family, row in sorted(facts.items()) if row["fsdp"]["state"] == state
        ]
        lines += ["", f"## {title}", "", *(f"- **{family}**: {why.split('; ')[0]}" for family, why in chosen)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
