"""A calculator as a tool: the model may call it, reads what it says, and answers.

7+15-3=            the row's prompt
<tool_call>{"name": "calculator", "arguments": {"expression": "7+15-3"}}</tool_call>
19                 what the tool says
19                 the answer, which is compared with the row's
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

from rlhf_dist.environments.environment import Chat
from rlhf_dist.environments.outcomes import PolicyError
from rlhf_dist.environments.tool_calls import JsonCalls, ToolParser
from rlhf_dist.environments.tool_use import ToolUse

_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_LONGEST = 200
"""Characters of an expression; arithmetic on what is that long stays small, and the parser's recursion shallow."""
_LARGEST = 1e15


def calculate(expression: str) -> str:
    """The value of a sum of numbers with + - * / // % and brackets. Raises PolicyError for anything else."""
    if len(expression) > _LONGEST:
        raise PolicyError(f"an expression must have at most {_LONGEST} characters, got {len(expression)}")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError) as error:
        raise PolicyError(f"{expression!r} has no value: {error}") from error
    return str(int(value)) if value == int(value) else str(value)


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        value: float = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError("it is no sum of numbers")
    if abs(value) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST:g}")
    return value


@dataclass(frozen=True, kw_only=True)
class Calculator(ToolUse):
    """Sums with a calculator at hand; 1 for the right answer. The last turn without a call is the answer."""

    parser: ToolParser = field(default_factory=lambda: JsonCalls(names=("calculator",)))
    """How calls are written."""
    argument: str = "expression"
    """The argument of a call that is calculated."""
    forgiving: bool = False
    """Tell the model what is wrong with a call; False ends the episode as a policy error."""

    async def use(self, chat: Chat, argument: str) -> str:
        """See ToolUse."""
        return calculate(argument)
