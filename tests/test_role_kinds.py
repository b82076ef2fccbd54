"""A kind of role is one record: what a graph asks of roles, workers and their interfaces, kinds of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_type_hints

import pytest

from rlhf_dist import worker as contract
from rlhf_dist.batch import Batch
from rlhf_dist.config import FunctionConfig, LanguageModelConfig, ModelConfig
from rlhf_dist.dataflow.facts import drawn_by, nodes_on_own_rows, speaker_of
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.role_kinds import kind_of
from rlhf_dist.roles import KINDS, Actor, Function, Opponent, Prompts, Reference, Reward, Teacher, op, ops_of
from rlhf_dist.typed import ConfigError
from rlhf_dist.worker import check_worker


def _class_at(path: str) -> type:
    module, name = path.split(":")
    found: type = getattr(import_module(module), name)
    return found


@pytest.mark.parametrize("interface", [kind for kind in KINDS if kind is not Function], ids=lambda kind: kind.__name__)
def test_every_worker_keeps_to_its_interface(interface: Any) -> None:
    """About 5 s for the first, which imports torch."""
    check_worker(_class_at(interface.worker), interface)
    if hasattr(interface, "rule_worker"):
        check_worker(_class_at(interface.rule_worker), interface)


@pytest.mark.parametrize(
    ("path", "protocols"),
    [
        ("workers.language_model:LanguageModelWorker", (contract.Syncing,)),
        ("workers.value_model:ValueModelWorker", (contract.Learning,)),
        ("workers.rollout:RolloutWorker", (contract.Receiving,)),
        ("workers.rule_reward:RuleRewardWorker", (contract.Closing,)),
    ],
)
def test_workers_have_what_the_controller_calls(path: str, protocols: tuple[Any, ...]) -> None:
    worker = _class_at(path)
    for protocol in protocols:
        for name in (name for name in dir(protocol) if not name.startswith("_")):
            mine, its = getattr(worker, name), getattr(protocol, name)
            kinds = {key: kind for key, kind in get_type_hints(mine).items() if key in get_type_hints(its)}
            assert kinds == get_type_hints(its), f"{path}.{name}"


@recipe
def duel(
    prompts: Prompts, actor: Actor, opponent: Opponent, teacher: Teacher, reference: Reference, reward: Reward
) -> None:
    """Everybody is asked for something else."""
    theirs = reward.compute_reward(opponent.generate_sequences(prompts))
    ours = reference.compute_ref_log_prob(actor.generate_sequences(prompts, n=2))
    teacher.compute_log_prob(teacher.generate_sequences(prompts), out={"log_probs": "hints"})
    both = actor.compute_log_prob(ours).join(theirs, rival="rewards")
    actor.compute_log_prob(theirs)
    actor.update(both, loss=_Nothing())


class _Nothing:
    reads, outputs, average = (), ("log_probs",), "tokens"

    def __call__(self, model: Any, rows: Any) -> Any:
        raise AssertionError("never run")


def test_facts_come_from_the_graph() -> None:
    dataflow = trace(duel)
    facts = dataflow.facts
    assert (dataflow.trained, dataflow.generating) == (("actor",), ("actor", "opponent", "teacher"))
    assert facts["opponent"].only_generates and not facts["teacher"].only_generates
    assert facts["teacher"].synced and not facts["opponent"].synced and not facts["reference"].generates
    assert [node.name for node in dataflow if node.kind == "reshard"] == ["actor.reshard"]
    assert drawn_by(dataflow, dataflow["actor.update"]) == {"actor"}, "a join brings columns"
    assert nodes_on_own_rows(dataflow, "actor") >= {"actor.compute_log_prob", "actor.update"}
    assert "actor.compute_log_prob#2" not in nodes_on_own_rows(dataflow, "actor"), "the opponent's"
    assert [speaker_of(dataflow, role) for role in ("actor", "teacher", "reference")] == ["actor", "teacher", "actor"]
    assert dataflow.bases["opponent"] == "LanguageModel" and "prompts" not in dataflow.bases
    written = {node.name: node.writes for node in dataflow}
    assert written["actor.compute_log_prob"] == ("old_log_probs", "entropy")
    assert written["teacher.compute_log_prob"] == ("hints", "entropy")
    assert dataflow["teacher.compute_log_prob"].out == {"log_probs": "hints"}
    assert dataflow["actor.compute_log_prob"].out == {"log_probs": "old_log_probs"}


@dataclass(frozen=True, kw_only=True)
class CheckerSettings(FunctionConfig):
    word: str = "7"


class CheckerWorker:
    def __init__(self, context: Any, config: CheckerSettings) -> None:
        self.word = config.word

    def check(self, batch: Batch, call: Any, *, strict: bool) -> Batch:
        raise AssertionError("never run")


class Checker(Function):
    settings, worker = CheckerSettings, CheckerWorker

    @op(reads=("response",), writes=("checked",))
    def check(self, batch: Batch, *, strict: bool = False) -> Batch: ...


def test_a_kind_of_the_users_own_is_a_record() -> None:
    found = kind_of(Checker)
    assert (found.base, found.head) == (Function, None) and list(ops_of(Checker)) == ["check"]


class WithoutOp:
    def __init__(self, context: Any, config: Any) -> None: ...


class OtherSettings(WithoutOp):
    def check(self, batch: Batch, call: Any) -> Batch: ...


class NoContext:
    def check(self, batch: Batch, call: Any, *, strict: bool) -> Batch: ...


@dataclass(frozen=True)
class Plain:
    word: str = ""


class Learner(Checker):
    @op(reads=("response",), weights_written="train")
    def learn(self, batch: Batch) -> None: ...


class LearnerWorker(CheckerWorker):
    def learn(self, batch: Batch, call: Any) -> Batch: ...


def _kind(base: type = Checker, **own: Any) -> type:
    return type("Mine", (base,), own)


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        (_kind(object), "role kind Mine must derive from LanguageModel, ValueModel, Reward, Function"),
        (_kind(settings=Plain), "Mine.settings must be a dataclass that derives from FunctionConfig .* got 'Plain'"),
        (_kind(Actor, settings=ModelConfig), "Mine.settings must be a dataclass that derives from LanguageModelConfig"),
        (_kind(worker=""), "Mine.worker has no value and needs one"),
        (
            _kind(worker=WithoutOp),
            r"Mine.worker WithoutOp lacks the op check; write def check\(self, batch, call, \*, strict",
        ),
        (_kind(worker=OtherSettings), r"OtherSettings: check must take \(self, batch, call, \*, strict\) .* got"),
        (_kind(worker=NoContext), r"Mine.worker NoContext must be constructed with \(context, ...\), got \(\)"),
        (_kind(Learner, worker=LearnerWorker), "Mine.worker LearnerWorker lacks save, which a role whose ops write"),
    ],
)
def test_a_missing_piece_is_said_in_one_line(interface: type, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        kind_of(interface)
    assert "\n" not in str(raised.value)


def test_settings_of_all_language_models_are_alike() -> None:
    assert {kind.settings for kind in (Actor, Reference, Opponent)} == {LanguageModelConfig}
