"""Rows of a group that a judge compares in pairs, in both orders: what recipes that ask for a winner share."""

from rlhf_dist.parsers import Choice
from rlhf_dist.prompt_template import Template
from rlhf_dist.transforms import both_orders, win_rates


def compared(batch, judge, question: str, marker: str, *, votes: int = 1, rounds: int = 1):
    """A part of a recipe: the rows with their win rates as rewards, and `judged`. question: about {prompt},
    {response_a} and {response_b}. marker: what stands before 1, 2 or tie in an answer. votes: answers to each question.
    rounds: responses of its group that each one is compared with."""
    choice = Choice({"1": 1.0, "2": 0.0, "tie": 0.5}, after=marker)
    asked = both_orders(batch, rounds=rounds)
    return win_rates(batch, judge.generate_sequences(asked, template=Template(question), parser=choice, n=votes))
