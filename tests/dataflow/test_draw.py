"""Drawings of a graph: JSON with every edge, text with levels, Mermaid and DOT that their readers accept."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from rlhf_dist.compose import compose_dataflow
from rlhf_dist.dataflow.draw import FORMATS, levels, to_dot, to_json, to_mermaid, to_text
from tests.shelf import of_each_shape


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


def test_all_formats_are_offered() -> None:
    assert set(FORMATS) == {"text", "mermaid", "dot", "json"}
