"""Rules that score reasoning: a format, and an answer. Chosen as `reward.function=recipes.reasoning._rewards:NAME`."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any

_TAGGED = re.compile(r"\s*<think>.*?</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def tagged_answer(response: str) -> str | None:
    """What stands in <answer> where the response is <think>...</think><answer>...</answer> and nothing else."""
    found = _TAGGED.fullmatch(response)
    return None if found is None or "<think>" in found[1] or "<answer>" in found[1] else found[1].strip()


def format_and_answer(response: str, answer: str) -> float:
    """Countdown (TinyZero's rule): 1 for an equation that is right, 0.1 for the format alone, else 0.

    answer: JSON with `numbers` and `target`, or the answer itself, which is then compared as text.
    """
    said = tagged_answer(response)
    if said is None:
        return 0.0
    try:
        wanted = json.loads(answer)
    except ValueError:
        wanted = answer
    if isinstance(wanted, Mapping):
        right = reaches(said, wanted["numbers"], wanted["target"])
    else:
        right = said == answer.strip()
    return 1.0 if right else 0.1


def reaches(equation: str, numbers: Sequence[int], target: float) -> bool:
    """Whether an expression of + - * / uses each of the numbers once, and no other, and has the value."""
    try:
        tree = ast.parse(equation.split("=")[0].strip(), mode="eval").body
        used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        return Counter(used) == Counter(numbers) and abs(_value(tree) - target) < 1e-5
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return False


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        found: float = _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
        return found
    raise ValueError(f"no arithmetic: {ast.dump(node)[:40]}")


def logic_rl(response: str, answer: str) -> float:
    """Logic-RL (2502.14768): format +1 or -1; then answer +2 if right, -1.5 if wrong, -2 where there is none to be
    read."""
    said = tagged_answer(response)
    if said is None:
        return -1.0 - 2.0
    if not said:
        return 1.0 - 2.0
    return 1.0 + (2.0 if said.lower() == answer.strip().lower() else -1.5)


def bleu(response: str, answer: str) -> float:
    """BLEUBERI (2505.11080): BLEU of words up to 4, against one reference or a JSON list of them; 0 to 1.

    exp(sum_n log p_n / 4) times the brevity penalty (Papineni et al. 2002), p_n with 1 added above and below the line
    for n > 1 (Lin and Och 2004), without which almost every sentence has 0.
    """
    try:
        listed = json.loads(answer)
    except ValueError:
        listed = answer
    references = [str(one).split() for one in (listed if isinstance(listed, list) else [answer])]
    said = response.split()
    if not said or not any(references):
        return 0.0
    total = 0.0
    for n in range(1, 5):
        own = Counter(tuple(said[at : at + n]) for at in range(len(said) - n + 1))
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= Counter(tuple(reference[at : at + n]) for at in range(len(reference) - n + 1))
        more = 1 if n > 1 else 0
        found, all_of_them = (own & most).total() + more, own.total() + more
        if not found:
            return 0.0
        total += log(found / all_of_them) / 4
    nearest = min((abs(len(reference) - len(said)), len(reference)) for reference in references)[1]
    return exp(total) * exp(min(0.0, 1 - nearest / len(said)))


def tool_calls(response: str, answer: str) -> float:
    """ToolRL (2504.13958): format 0 or 1, and correctness from -3 to 3 of the calls in <tool_call> lines.

    answer: a JSON list of {"name": ..., "parameters": {...}}. Correctness is 6 R / S - 3: R counts the overlap of names
    (intersection over union), and for each wanted call, at its best partner, that of parameter names and the parameters
    whose values match; S is the most that R can be. A call that cannot be read makes it -3.
    """
    wanted: list[Mapping[str, Any]] = json.loads(answer)
    if not isinstance(wanted, list) or not all(isinstance(call, dict) and "name" in call for call in wanted):
        raise ValueError(f'the answer must be a JSON list of {{"name": ..., "parameters": ...}}, got {answer[:80]!r}')
    found = re.search(r"<tool_call>(.*?)</tool_call>", response, re.DOTALL)
    formatted = float(
        re.fullmatch(r"\s*<think>.*?</think>\s*<tool_call>.*?</tool_call>\s*", response, re.DOTALL) is not None
    )
    try:
        lines = [line for line in (found[1] if found else "").splitlines() if line.strip()]
        said = [call for line in lines if isinstance(call := json.loads(line), dict)]
    except ValueError:
        return formatted - 3.0
    names, own = Counter(call["name"] for call in wanted), Counter(str(call.get("name")) for call in said)
    most = 1.0 + len(wanted) + sum(len(call.get("parameters", {})) for call in wanted)
    score = (names & own).total() / max((names | own).total(), 1)
    left = list(said)
    for call in wanted:
        scored = [(_overlap(call, other), at) for at, other in enumerate(left) if other.get("name") == call["name"]]
        if scored:
            best, at = max(scored)
            score += best
            left.pop(at)
    return formatted + 6 * score / most - 3


def _overlap(call: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    ours, theirs = call.get("parameters", {}), other.get("parameters", {})
    if not isinstance(theirs, Mapping):
        return 0.0
    names = len(ours.keys() & theirs.keys()) / max(len(ours.keys() | theirs.keys()), 1) if ours or theirs else 1.0
    return names + sum(name in theirs and theirs[name] == value for name, value in ours.items())
