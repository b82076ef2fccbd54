"""Calls of generate_sequences with a template, a parser, sampling of their own: edges, facts, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_dist.dataflow import ColumnOrigin, GraphError
from rlhf_dist.dataflow.facts import nodes_on_own_rows, speaker_of
from rlhf_dist.dataflow.recipe import Recipe, recipe
from rlhf_dist.dataflow.token_makers import makers, reads_others_tokens
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.parsers import Number
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Critic, Judge, Preferences, Prompts, Reference
from rlhf_dist.transforms import verdict_means

ASK = Template("{prompt} {response}")


@recipe
def judged(prompts: Prompts, actor: Actor, judge: Judge, reference: Reference) -> None:
    batch = actor.generate_sequences(prompts, n=2)
    verdicts = judge.generate_sequences(batch, template=ASK, parser=Number(), n=3)
    batch = verdict_means(batch, verdicts)
    mixed = actor.generate_sequences(prompts, mixture=(reference, 0.25))
    actor.compute_log_prob(mixed)
    actor.compute_log_prob(batch)
    reference.compute_ref_log_prob(batch)


def test_a_judge_reads_what_its_template_names_and_writes_what_its_parser_does() -> None:
    dataflow = trace(judged)
    node = dataflow["judge.generate_sequences"]
    assert {name: at.node for name, at in node.inputs[0].columns.items()} == {
        "prompt": "actor.generate_sequences",
        "response": "actor.generate_sequences",
    }
    assert node.writes[:2] == ("prompt_ids", "prompt") and node.writes[-2:] == ("score", "parsed")
    assert dataflow.facts["judge"].only_generates
    assert not reads_others_tokens(dataflow, "judge"), "its words may be its own"
    assert all(reads_others_tokens(dataflow, role) for role in ("actor", "reference"))


def test_rows_under_another_prompt_are_the_roles_tokens_without_what_was_said_of_the_old() -> None:
    found: dict[str, Any] = {}

    def asked_again(prompts: Prompts, actor: Actor, reference: Reference) -> None:
        batch = reference.compute_ref_log_prob(actor.generate_sequences(prompts))
        other = actor.encode(batch, template=Template("{prompt} {prompt_ids} shorter?"))
        told = actor.encode(batch, template=Template("{prompt}"), response="raw_response")
        found.update(
            other=other, told=told, nodes={node.name: node for node in batch.tracer.nodes}, columns=batch.columns
        )

    dataflow = trace(recipe(asked_again))
    gone = set(found["columns"]) - set(found["other"].columns)
    assert gone == {"rollout_log_probs", "ref_log_probs"}
    assert not {"ref_log_probs", "rollout_log_probs", "raw_response"} & set(found["told"].columns)
    assert dataflow["actor.encode"].kwargs["decode"] == {"prompt_ids": "prompts"}
    assert makers(found["nodes"], found["other"].origins["prompt_ids"]) == {"actor"}
    assert dataflow.facts["actor"].computes, "its training engine's ranks have the tokenizer"


def test_a_mixture_reads_the_other_roles_generation_weights_and_its_rows_are_of_another_policy() -> None:
    dataflow = trace(judged)
    assert dataflow["actor.generate_sequences#2"].weights_read == ("actor.rollout", "reference.rollout")
    assert dataflow.facts["reference"].generates and dataflow.facts["reference"].synced
    own = nodes_on_own_rows(dataflow, "actor")
    assert "actor.compute_log_prob#2" in own and "actor.compute_log_prob" not in own
    assert speaker_of(dataflow, "reference") == "actor", "it lends its logits and draws nothing"


def test_whose_tokens_a_column_holds_is_found_through_whatever_moved_it() -> None:
    found: dict[str, Any] = {}

    def moved(prompts: Prompts, pairs: Preferences, actor: Actor, judge: Judge) -> None:
        batch = actor.generate_sequences(prompts).rename(said="response_ids", asked="prompt_ids")
        theirs = judge.generate_sequences(batch, template=Template("{said} {asked}"))
        found["decode"] = batch.tracer.nodes[-1].kwargs["decode"]
        batch = batch.join(theirs, verdict_ids="response_ids")
        judge.generate_sequences(batch.where("finished")[0], template=Template("{verdict_ids} {finished}"))
        found["later"] = batch.tracer.nodes[-1].kwargs["decode"]
        found["given"] = makers({node.name: node for node in batch.tracer.nodes}, pairs.origins["response_ids"])
        found["text"] = makers({node.name: node for node in batch.tracer.nodes}, ColumnOrigin("prompts", "prompt"))

    trace(recipe(moved))
    assert found["decode"] == {"said": "actor", "asked": "prompts"}
    assert found["later"] == {"verdict_ids": "judge"}
    assert found["given"] == {"pairs"} and found["text"] == frozenset()


def refused(call: Callable[[Any, Any, Any, Any, Any], Any]) -> str:
    def mine(prompts: Prompts, actor: Actor, judge: Judge, reference: Reference, critic: Critic) -> None:
        call(actor.generate_sequences(prompts), actor, judge, reference, critic)

    made: Recipe = recipe(mine)
    with pytest.raises(GraphError) as error:
        trace(made)
    assert str(error.value).startswith("test_generation_calls.py:") and "\n" not in str(error.value)
    return str(error.value).split(": ", 1)[1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda b, a, j, r, c: j.generate_sequences(b, template=Template("{respond}")), "did you mean 'response'?"),
        (lambda b, a, j, r, c: j.generate_sequences(b, template=Template("{rewards}")), "reads column 'rewards'"),
        (lambda b, a, j, r, c: j.generate_sequences(b, template="{prompt}"), "takes a Template"),
        (lambda b, a, j, r, c: j.generate_sequences(b, template=Template("{finished} {policy_version}")), "is [B, T]"),
        (lambda b, a, j, r, c: j.generate_sequences(b, parser=Number), "takes an object with columns"),
        (lambda b, a, j, r, c: j.generate_sequences(b, parser=max), "takes an object with columns"),
        (lambda b, a, j, r, c: a.encode(b, template="{prompt}"), "encode needs template=, a Template"),
        (lambda b, a, j, r, c: a.encode(b, template=Template("{why}")), "reads column 'why'"),
        (lambda b, a, j, r, c: j.generate_sequences(b, stop="x"), "write stop=('###',)"),
        (lambda b, a, j, r, c: j.generate_sequences(b, stop=("",)), "not empty"),
        (lambda b, a, j, r, c: j.generate_sequences(b, temperature=0.0), "temperature must be > 0"),
        (lambda b, a, j, r, c: j.generate_sequences(b, max_tokens=0), "max_tokens must be >= 1"),
        (lambda b, a, j, r, c: j.generate_sequences(b, max_tokens=1.5), "max_tokens, a whole number, got 1.5"),
        (lambda b, a, j, r, c: j.generate_sequences(b, temperature="hot"), "temperature, a number, got 'hot'"),
        (lambda b, a, j, r, c: j.generate_sequences(b, prefix=3), "name of a column"),
        (lambda b, a, j, r, c: j.generate_sequences(b, prefix="hint"), "reads column 'hint'"),
        (lambda b, a, j, r, c: j.generate_sequences(b, prefix="finished"), "a prefix is text or token ids"),
        (lambda b, a, j, r, c: a.generate_sequences(b, mixture=(r, 1.5)), "share in [0, 1]"),
        (lambda b, a, j, r, c: a.generate_sequences(b, mixture=r), "mixture=(reference, 0.125)"),
        (lambda b, a, j, r, c: a.generate_sequences(b, mixture=(c, 0.5)), "another language model"),
        (lambda b, a, j, r, c: a.generate_sequences(b, mixture=(a, 0.5)), "with itself"),
        (lambda b, a, j, r, c: j.generate_sequences(b, tempersture=0.5), "did you mean 'temperature'?"),
    ],
)
def test_what_cannot_be_meant_is_one_line_with_the_recipes_line_and_the_remedy(call: Any, said: str) -> None:
    assert said in refused(call)


def test_a_token_column_of_two_tokenizers_is_not_written_into_a_template() -> None:
    def both(batch: Any, actor: Any, judge: Any, reference: Any, critic: Any) -> None:
        other = judge.generate_sequences(batch, template=ASK)
        judge.generate_sequences(batch.concat(other), template=Template("{response_ids}"))

    assert "token ids that actor and judge made" in refused(both)
