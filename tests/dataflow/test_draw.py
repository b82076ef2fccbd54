"""Drawings of a graph: JSON with every edge, text with levels, Mermaid and DOT that their readers accept."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rlhf_dist.compose import compose_dataflow, compose_graphs
from rlhf_dist.dataflow.draw import FORMATS, levels, to_dot, to_json, to_mermaid, to_text
from tests.shelf import of_each_shape

OWN = """
from rlhf_dist.algorithms import nll
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples, Prompts


def asked(prompts: Prompts, actor: Actor) -> None:
    actor.generate_sequences(prompts, n=2)


@recipe(evaluation=asked)
def mine(examples: Examples, actor: Actor) -> None:
    actor.update_actor(examples, loss=nll())
"""


@pytest.mark.parametrize("name", of_each_shape())
def test_json_has_every_node_and_edge(name: str) -> None:
    dataflow = compose_dataflow(name)
    drawn = json.loads(to_json(dataflow))
    assert [node["name"] for node in drawn["nodes"]] == [node.name for node in dataflow]
    assert all({"name", "role", "op", "reads", "writes"} <= set(node) for node in drawn["nodes"])
    assert len(drawn["edges"]) == len(dataflow.edges) > 0
    names = {node["name"] for node in drawn["nodes"]}
    for edge in drawn["edges"]:
        assert {edge["source"], edge["target"]} <= names and isinstance(edge["distance"], int)
        assert ("column" in edge) != ("weights" in edge)


def test_json_of_ppo_shows_siblings_after_generation() -> None:
    edges = json.loads(to_json(compose_dataflow("ppo")))["edges"]
    for target in ("critic.compute_values", "reference.compute_ref_log_prob", "reward.compute_reward"):
        assert {edge["source"] for edge in edges if edge["target"] == target and "column" in edge} == {
            "actor.generate_sequences"
        }
    assert {
        "source": "actor.reshard",
        "target": "actor.generate_sequences",
        "weights": "actor.rollout",
    }.items() <= next(
        edge for edge in edges if edge["distance"] == 1 and edge.get("weights") == "actor.rollout"
    ).items()


def test_levels_put_what_need_not_wait_side_by_side() -> None:
    level = levels(compose_dataflow("ppo"))
    assert level["critic.compute_values"] == level["reference.compute_ref_log_prob"] == level["reward.compute_reward"]
    assert level["prompts"] < level["actor.generate_sequences"] < level["critic.compute_values"] < level["gae"]
    for name in of_each_shape():
        dataflow = compose_dataflow(name)
        at = levels(dataflow)
        assert all(at[edge.source] < at[edge.target] for edge in dataflow.edges if edge.distance == 0)


def test_text_brackets_siblings_and_lists_loop_carried_edges() -> None:
    text = to_text(compose_dataflow("ppo"))
    assert re.search(r"┌ actor\.compute_log_prob.*\n(.*\n)*?.*└ reward\.compute_reward", text)
    assert "actor.reshard --actor.rollout--> actor.generate_sequences  (next step)" in text
    assert re.search(r"gae +ppo\.py:\d+ ", text)


@pytest.mark.parametrize("name", of_each_shape())
def test_mermaid_is_well_formed_and_groups_columns(name: str) -> None:
    dataflow = compose_dataflow(name)
    lines = to_mermaid(dataflow).splitlines()
    node = r'n\d+(\["[^"]+"\]|\(\["[^"]+"\]\)|\{\{"[^"]+"\}\}|\[\("[^"]+"\)\])'
    arrow = r'n\d+ (-->|-\.->)\|"[^"]+"\| n\d+'
    style = r"classDef role\d+ fill:#\w+,stroke:#\w+,color:#\w+|class n\d+(,n\d+)* role\d+"
    assert lines[0] == "flowchart TD"
    assert all(re.fullmatch(f"    ({node}|{arrow}|{style})", line) for line in lines[1:])
    assert all(not re.search(r"#(?!35;|quot;)", line.split('"')[1]) for line in lines[1:] if '"' in line)
    solid = [line.split("|")[0] + line.split("|")[2] for line in lines if "-->" in line]
    assert len(solid) == len(set(solid)), "columns between two nodes share one arrow"


def test_dot_quotes_every_name() -> None:
    dot = to_dot(compose_dataflow("remax"))
    assert '"actor.generate_sequences#2"' in dot and dot.count("{") == dot.count("}") == 1
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input=dot, text=True, capture_output=True, timeout=60, check=True)


def test_what_is_evaluated_stands_apart_with_its_cadence(tmp_path: Path) -> None:
    dataflow, evaluations = compose_graphs("grpo", ["output.evaluate_every=5"])
    names = ["prompts", "actor.generate_sequences", "reward.compute_reward"]
    title = "heldout, before the first step, after every 5 steps and after the last"
    (drawn,) = json.loads(to_json(dataflow, evaluations))["evaluations"]
    assert [node["name"] for node in drawn["nodes"]] == names and (drawn["every"], drawn["rows"]) == (5, True)
    assert f"heldout, {drawn['when']}" == title and {edge["source"] for edge in drawn["edges"]} == set(names[:2])
    text = to_text(dataflow, evaluations).partition(title)
    assert text[1] and re.findall(r"^ +\d+   (\S+)", text[2], re.MULTILINE) == names
    mermaid = to_mermaid(dataflow, evaluations)
    inside = re.search(rf'subgraph e0\["{title}"\]\n(.*?)\n    end\n', mermaid, re.DOTALL)
    assert inside and [name for name in names if f'"{name}"' in inside[1]] == names
    assert re.search(r"class n1,\S*e0n1 role\d", mermaid), "a role has one colour everywhere"
    dot = to_dot(dataflow, evaluations)
    assert f'label="{title}"' in dot and '"heldout/prompts" -> "heldout/actor.generate_sequences"' in dot
    assert compose_graphs("grpo", ["data.heldout=null"])[1] == ()


def test_a_recipe_s_own_evaluation_is_drawn_with_or_without_rows(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    for rows, when in (("null", "never, since data.heldout is not set"), ("{path: x.jsonl}", "before the first step")):
        dataflow, evaluations = compose_graphs(f"{tmp_path}/mine.py", ["task=none", f"data.heldout={rows}"])
        (one,) = evaluations
        assert [node.name for node in one.dataflow] == ["prompts", "actor.generate_sequences"]
        assert one.when.startswith(when) and f"heldout, {when}" in to_text(dataflow, evaluations)


def test_all_formats_are_offered() -> None:
    assert set(FORMATS) == {"text", "mermaid", "dot", "json"}
