"""What the curves of a run say about it, in words: each signal is good, to be watched, or bad, and says what may help.

A signal reads the last steps, and the first ones where it is about a change. Where a run has no such metric there is no
signal: silence is not health. Limits are those at which people who train policies begin to look; each has its reason
beside it, none of them ends a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Literal

from controller.lifecycle.step_warnings import nothing_learned
from controller.report.curves import Values

State = Literal["good", "watch", "bad"]
RECENT = 10
"""Steps at either end that are taken together: one step is noise."""


@dataclass(frozen=True, kw_only=True)
class Signal:
    """One line of a run's health."""

    title: str
    state: State
    says: str
    help: str = ""
    metric: str | None = None
    step: int | None = None
    """Where to look; None: the curve as a whole."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A run's metrics, aligned with `steps`, and those of its evaluations."""

    steps: Sequence[int]
    series: Mapping[str, Values]
    heldout: Mapping[str, Values] = field(default_factory=dict)
    repeated: Sequence[tuple[int, float]] = ()
    """(step, share of different prompts with the same response), of steps whose rollouts were kept."""

    def named(self, *names: str) -> Iterable[tuple[str, list[float]]]:
        """Metrics NODE/NAME with their finite values."""
        for metric, values in self.series.items():
            if metric.rpartition("/")[2] in names:
                there = [value for value in values if value is not None]
                if there:
                    yield metric, there


def first(values: Sequence[float]) -> float:
    """Mean of the first steps; of a short run, of its first half."""
    return fmean(values[: max(1, min(RECENT, len(values) // 2))])


def last(values: Sequence[float]) -> float:
    """Mean of the last steps; of a short run, of its second half."""
    return fmean(values[-max(1, min(RECENT, len(values) // 2)) :])


def signals(numbers: Numbers) -> list[Signal]:
    """All that can be said, the worst first."""
    found = [signal for rule in RULES for signal in rule(numbers)]
    order: tuple[State, ...] = ("bad", "watch", "good")
    return sorted(found, key=lambda one: order.index(one.state))


def _graded(value: float, watch: float, bad: float) -> State:
    return "bad" if value > bad else "watch" if value > watch else "good"


def kl_to_reference(numbers: Numbers) -> Iterable[Signal]:
    """Nats a token away from the reference. 0.3 a token is 60 nats for a response of 200: past what most published runs
    end with; at 1.5 the reference gives a token a quarter of the policy's probability, on average."""
    for metric, values in numbers.named("ref_kl"):
        now = last(values)
        if now < -0.05:
            yield Signal(
                title="KL to the reference", state="bad", metric=metric,
                says=f"{now:.3g} nats a token on average, and a KL is never below 0: responses are scored by another "
                f"policy than the one that wrote them",
                help="look at the sampler-trainer mismatch, the temperature and the weight versions of the rollouts",
            )  # fmt: skip
            continue
        state = _graded(now, 0.3, 1.5)
        yield Signal(
            title="KL to the reference", state=state, metric=metric,
            says=f"{now:.3g} nats a token, from {first(values):.3g}" + ("" if state == "good" else
                 ": the policy has gone far from the model it began with"),
            help="" if state == "good" else "raise kl_coef or lower the learning rate, and read its responses",
        )  # fmt: skip


def update_size(numbers: Numbers) -> Iterable[Signal]:
    """KL from before a step's updates to after, k3: over 0.05 the rows were drawn by a policy that is far by now."""
    for metric, values in numbers.named("old_kl_k3"):
        now = last(values)
        state = _graded(now, 0.05, 0.2)
        says = f"the policy moves {now:.3g} nats a token in a step"
        yield Signal(
            title="Size of updates", state=state, metric=metric, says=says,
            help="" if state == "good" else "lower the learning rate, or take fewer epochs or mini-batches a step",
        )  # fmt: skip


def entropy(numbers: Numbers) -> Iterable[Signal]:
    """A policy that always says the same explores nothing; one whose entropy grows forgets its language."""
    for metric, values in numbers.named("entropy"):
        begin, now = first(values), last(values)
        if begin <= 0:
            continue
        share = now / begin
        state: State = "bad" if share < 0.05 else "watch" if share < 0.25 or share > 2 else "good"
        says = f"{now:.3g} nats a token, {share:.0%} of the {begin:.3g} it began with"
        if state != "good":
            says += ": it has nearly stopped to explore" if share < 1 else ": it grows less and less sure"
        grown = "lower the learning rate, and read its responses"
        helps = "" if state == "good" else grown if share > 1 else "a higher temperature, entropy_coef, or more KL"
        yield Signal(title="Entropy", state=state, metric=metric, says=says, help=helps)


def clipping(numbers: Numbers) -> Iterable[Signal]:
    """Tokens whose ratio is outside the clip teach nothing; 0.1 to 0.3 is what PPO is used with."""
    for metric, values in numbers.named("clip_fraction"):
        now = last(values)
        state = _graded(now, 0.3, 0.5)
        yield Signal(
            title="Clipped tokens", state=state, metric=metric, says=f"{now:.1%} of the tokens are clipped",
            help="" if state == "good" else "lower the learning rate, or take fewer updates of the same rows",
        )  # fmt: skip


def ratios(numbers: Numbers) -> Iterable[Signal]:
    """The mean ratio of new to old probability is 1 in expectation under the old policy: far from it, few tokens with
    extreme ratios make the gradient."""
    for metric, values in numbers.named("ratio", "rollout_ratio"):
        away = [abs(value - 1) for value in values]
        worst = max(range(len(away)), key=away.__getitem__)
        state = _graded(max(last(away), away[worst] / 5), 0.1, 0.5)
        yield Signal(
            title="Ratio extremes", state=state, metric=metric, step=_step_of(numbers, metric, worst),
            says=f"the mean ratio is {last(values):.4g}, and {values[worst]:.4g} where it was furthest from 1",
            help="" if state == "good" else "lower the learning rate; for rollout_ratio see the mismatch",
        )  # fmt: skip


def critic(numbers: Numbers) -> Iterable[Signal]:
    """Below 0 the critic's values are worse than none: advantages carry its errors."""
    for metric, values in numbers.named("explained_variance"):
        now = last(values)
        state: State = "bad" if now < -0.5 else "watch" if now < 0 else "good"
        yield Signal(
            title="Explained variance of the critic", state=state, metric=metric,
            says=f"its values explain {now:.1%} of what the returns differ by"
            + ("" if state == "good" else ": less than a constant would"),
            help="" if state == "good" else "train the critic longer (critic_warmup), or with a higher learning rate",
        )  # fmt: skip


def lengths(numbers: Numbers) -> Iterable[Signal]:
    """Length is the easiest thing for a policy to move: a reward that grows with it is often a reward for length."""
    for metric, values in numbers.named("response_tokens"):
        begin, now = first(values), last(values)
        if begin <= 0:
            continue
        times = now / begin
        state: State = "watch" if times > 1.5 or times < 0.5 else "good"
        state = "bad" if times > 4 or times < 0.1 else state
        yield Signal(
            title="Length of responses", state=state, metric=metric,
            says=f"{now:.4g} tokens, {times:.2g} times the {begin:.4g} of the beginning",
            help="" if state == "good" else "read early and late responses to the same prompt side by side",
        )  # fmt: skip
    for metric, values in numbers.named("finished"):
        now = last(values)
        if now < 0.7:
            yield Signal(
                title="Cut responses", state="watch" if now > 0.3 else "bad", metric=metric,
                says=f"{1 - now:.0%} of the responses are cut by the limit before they end",
                help="raise max_response_tokens, or penalise or mask cut responses",
            )  # fmt: skip


def equal_rewards(numbers: Numbers) -> Iterable[Signal]:
    """Groups whose rewards are all equal teach nothing; half of them is half of the generation for nothing."""
    for metric, values in numbers.named("zero_variance_groups"):
        now = last(values)
        state = _graded(now, 0.5, 0.9)
        yield Signal(
            title="Groups without a difference", state=state, metric=metric,
            says=f"in {now:.0%} of the groups all rewards are equal",
            help="" if state == "good" else "easier or harder prompts, more samples a prompt, or drop_equal_groups",
        )  # fmt: skip


def reward_hacking(numbers: Numbers) -> Iterable[Signal]:
    """Hints, not proofs: what is rewarded goes up while what it stands for does not."""
    rewards = [one for one in numbers.named("reward") if one[0].startswith("reward/")] or list(numbers.named("reward"))
    for metric, values in rewards[:1]:
        begin, now = first(values), last(values)
        noise = median(abs(b - a) for a, b in zip(values, values[1:], strict=False)) if len(values) > 1 else 0.0
        rises = len(values) >= 4 and now - begin > 2 * noise and now > begin
        hints, helps = [], "read the responses with the highest rewards, early and late"
        for name, evaluated in numbers.heldout.items():
            there = [value for value in evaluated if value is not None]
            if name.endswith("/reward") and len(there) > 1 and rises and there[-1] < there[0]:
                hints.append(f"{name} fell from {there[0]:.3g} to {there[-1]:.3g}")
        for name, tokens in numbers.named("response_tokens"):
            together = _correlation(values, tokens)
            if rises and together is not None and together > 0.8 and last(tokens) > 1.5 * first(tokens):
                hints.append(f"{name} rises with it (correlation {together:.2f})")
        if numbers.repeated and numbers.repeated[-1][1] > 0.5:
            step, share = numbers.repeated[-1]
            hints.append(f"at step {step} the same response was given to {share:.0%} of the prompts")
        if hints:
            grows = f"the reward went from {begin:.3g} to {now:.3g}, and " if rises else ""
            yield Signal(
                title="Reward hacking?", state="watch", metric=metric, says=grows + "; ".join(hints), help=helps
            )
        elif rises:
            yield Signal(
                title="Reward hacking?", state="good", metric=metric,
                says=f"no hint: the reward went from {begin:.3g} to {now:.3g}, and nothing suspicious with it",
            )  # fmt: skip


def mismatch(numbers: Numbers) -> Iterable[Signal]:
    """Mean |log-prob of the sampler - log-prob of the trainer|. bfloat16 alone makes 0.005 to 0.02; 0.1 is another
    model: an old weight version, another temperature or another chat template."""
    for metric, values in numbers.named("rollout_mismatch"):
        now = last(values)
        state = _graded(now, 0.02, 0.1)
        yield Signal(
            title="Sampler against trainer", state=state, metric=metric,
            says=f"log-probs of the same tokens differ by {now:.2g} nats on average",
            help="" if state == "good" else "algorithm.correction, the same dtype on both sides, or a lower staleness",
        )  # fmt: skip


def learning(numbers: Numbers) -> Iterable[Signal]:
    """Steps that taught nothing, as a run says them when they happen; steps left out, numbers that were none."""
    idle = []
    for at, step in enumerate(numbers.steps):
        row = {name: value for name, values in numbers.series.items() if (value := values[at]) is not None}
        if nothing_learned(row):
            idle.append((step, row))
    if idle:
        share = len(idle) / len(numbers.steps)
        yield Signal(
            title="Steps without a lesson", state="bad" if share > 0.5 else "watch", step=idle[-1][0],
            says=f"{len(idle)} of {len(numbers.steps)} steps; the last: {nothing_learned(idle[-1][1])}",
        )  # fmt: skip
    for metric, values in numbers.named("skipped_steps", "nonfinite_metrics"):
        if any(values):
            at = max(k for k, value in enumerate(numbers.series[metric]) if value)
            yield Signal(
                title="Numbers that are none", state="bad", metric=metric, step=numbers.steps[at],
                says=f"{metric} is above 0 in {sum(1 for value in values if value)} steps",
                help="see nonfinite/ in the run's folder; lower the learning rate, or train in float32",
            )  # fmt: skip


RULES: tuple[Callable[[Numbers], Iterable[Signal]], ...] = (
    learning, kl_to_reference, update_size, entropy, clipping, ratios, critic, lengths, equal_rewards,
    reward_hacking, mismatch,
)  # fmt: skip


def _step_of(numbers: Numbers, metric: str, at: int) -> int:
    """The step of the `at`-th finite value of a metric."""
    return [step for step, value in zip(numbers.steps, numbers.series[metric], strict=True) if value is not None][at]


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's, of two curves of the same steps; None where one of them is constant or they do not match."""
    if len(one) != len(other) or len(one) < 8:
        return None
    mean, other_mean = fmean(one), fmean(other)
    both = sum((a - mean) * (b - other_mean) for a, b in zip(one, other, strict=True))
    size = sum((a - mean) ** 2 for a in one) * sum((b - other_mean) ** 2 for b in other)
    return both / float(size**0.5) if size > 0 else None
