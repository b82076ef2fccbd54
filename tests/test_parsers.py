"""What parsers and templates take, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import pytest

from rlhf_dist.missing import is_missing
from rlhf_dist.parsers import Choice, JsonFields, Number, Numbers, Pattern, columns_of, parsed_columns
from rlhf_dist.prompt_template import Template

WHO = Choice({"1": 1.0, "2": 0.0, "tie": 0.5}, after="Better:")
GRADE = JsonFields({"grade.score": "number", "why": "text"}, optional=("why",))


@pytest.mark.parametrize(
    ("parser", "text", "value"),
    [
        (Number("Score:"), "I would say 3. Score: 4", 4.0),
        (Number("Score:"), "**Score:** 4.5/5", 4.5),
        (Number("Score:"), "Score: [[-2]]", -2.0),
        (Number("Score:"), "Score: 1\nno, Score: 2", 2.0),
        (Number("Score:", low=0, high=5), "Score: 7", None),
        (Number("Score:"), "Score: many, at least 4", None),
        (Number(), "2 of 3", 3.0),
        (Number(), "nothing", None),
        (WHO, "Better: 1", 1.0),
        (WHO, "Better: [[2]].", 0.0),
        (WHO, "Better: *tie*", 0.5),
        (WHO, "Better: 12", None),
        (WHO, "1 is better", None),
        (Choice({"A": 1, "B": 0}), "An A for Anna, then B", 0.0),
        (Choice({"A": 1, "B": 0}), "A_1", 1.0),
        (Pattern(r"(?P<s>\d+) of 5", numbers=("s",)), "it has 4 of 5", 4.0),
        (Pattern(r"<why>(?P<why>.*?)</why>"), "<why>a\nb</why>", "a\nb"),
        (Pattern(r"(?P<s>\w+) of 5", numbers=("s",)), "four of 5", None),
        (GRADE, 'so {"grade": {"score": 3}, "why": "x"}', 3.0),
        (GRADE, '{"grade": {"score": 1}} then {"grade": {"score": 2}} end', 2.0),
        (GRADE, '{"grade": {"score": "NaN"}}', None),
        (GRADE, '{"grade": {"score": true}}', None),
        (GRADE, '{"grade": {"score": 3}', None),
        (GRADE, '{"grade": 3}', None),
        (GRADE, "{{{{", None),
        (Numbers("Scores:"), "Scores: 3, 1.5 and 5\n7", [3.0, 1.5, 5.0]),
        (Numbers("Scores:"), "3, 1", None),
        (Numbers(), "none", None),
    ],
)
def test_a_text_is_a_value_or_none(parser: Any, text: str, value: Any) -> None:
    columns, unparsed = parsed_columns(parser, [text, "?"])
    name = next(iter(parser.columns))
    assert columns_of(parser) == (*parser.columns, "parsed")
    assert columns["parsed"].values.tolist() == [value is not None, False] and unparsed == 1 + (value is None)
    found = columns[name].row(0)
    if value is None:
        assert len(found) == 0 if parser.columns[name] != "number" else is_missing(np.array([found])).all()
    else:
        assert (found if isinstance(value, str) else found.tolist()) == value


@dataclass(frozen=True)
class Length:
    """A parser of one's own."""

    columns = {"length": "number"}

    def __call__(self, text: str) -> dict[str, float] | None:
        return {"length": len(text)} if text else None


def test_a_parser_of_ones_own_travels_by_value() -> None:
    there = cloudpickle.loads(cloudpickle.dumps(Length()))
    columns, unparsed = parsed_columns(there, ["abc", ""])
    np.testing.assert_array_equal(columns["length"].values, np.float32([3, np.nan]))
    assert unparsed == 1


def test_no_row_at_all_has_columns_of_the_right_kind() -> None:
    columns, unparsed = parsed_columns(GRADE, [])
    assert unparsed == 0 and columns["score"].values.dtype == np.float32 and columns["why"].text
    assert parsed_columns(Numbers(), [])[0]["numbers"].offsets is not None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Pattern(r"(?P<a>\d"), "cannot read the regular expression"),
        (lambda: Pattern(r"\d"), "write (?P<NAME>...)"),
        (lambda: Pattern(r"(?P<a>\d)", numbers=("b",)), "needs one called 'b'"),
        (lambda: Choice({}), "Choice needs words"),
        (lambda: JsonFields({"a": "float"}), "can be number, text, numbers"),  # type: ignore[dict-item]
        (lambda: JsonFields({"a": "number"}, optional=("a",)), "only texts and lists may be missing"),
        (lambda: Template(""), "needs a text"),
        (lambda: Template("{prompt"), "double the braces"),
        (lambda: Template('{"score": 1}'), "a field is a column's name"),
        (lambda: Template("{a.b}"), "a field is a column's name"),
        (lambda: columns_of(Number), "takes an object with columns"),
        (lambda: columns_of(lambda text: None), "takes an object with columns"),
    ],
)
def test_what_cannot_be_meant_is_said_when_it_is_written(make: Any, said: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_template_is_filled_with_texts_and_numbers() -> None:
    template = Template('{prompt} {{"x": 1}} {rewards} {rewards:.2f}', system="{name}", answer="Score: ")
    assert template.columns == ("prompt", "rewards", "name")
    row = {"prompt": "a{b}", "rewards": np.float32(0.7), "name": "n"}
    messages, answer = template.messages(row)
    assert [one["content"] for one in messages] == ["n", 'a{b} {"x": 1} 0.7 0.70'] and answer == "Score: "
    with pytest.raises(ValueError, match="column 'rewards'"):
        template.messages({**row, "rewards": np.zeros(2)})
