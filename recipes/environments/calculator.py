"""A calculator that the model may call before it answers."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from recipes.environments.environment import End, Environment, Observation, Talk, ToolCall
from recipes.environments.registry import register_environment

__all__ = ["Calculator", "calculate"]

LONGEST = 200  # characters of an expression
LARGEST = 2**256
DIGITS = 12  # of a number that is not whole
ONLY = "only numbers, + - * / // % ** and parentheses are known"
_KNOWN = re.compile(r"[\d\s.+\-*/%()eE]*", re.ASCII)


@register_environment("calculator")
class Calculator(Environment):
    """Offers one tool, `calculator(expression)`, in the prompt. A turn that calls it is answered with the results, another one is
    the answer, which trainer.grpo.reward scores."""

    bounds_itself = True
    tools = (
        {
            "type": "function",
            "function": {
                "name": "calculator",
                "description": "Works out an arithmetic expression, exactly.",
                "parameters": {
                    "type": "object",
                    "properties": {"expression": {"type": "string", "description": "such as (3 + 4) * 2 / 7"}},
                    "required": ["expression"],
                },
            },
        },
    )

    def step(self, talk: Talk) -> Observation | End:
        if not talk.calls:
            return End()
        return Observation([call.result(self._answer(call)) for call in talk.calls])

    def _answer(self, call: ToolCall) -> str:
        if call.complaint:
            return f"error: the call cannot be read, {call.complaint}"
        if call.name != "calculator":
            return f"error: there is no tool {call.name[:40]}, only calculator"
        expression = call.arguments.get("expression")
        if not isinstance(expression, str):
            return "error: expression must be a text"
        try:
            return calculate(expression)
        except ValueError as error:
            return f"error: {error}"


_UNARY: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_BINARY: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % ** and parentheses: reckoned in fractions, written as a whole number or
    with twelve digits.

    Raises:
        ValueError: it is another, divides by zero, or becomes too large.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression is longer than {LONGEST} characters")
    spelt = expression.translate({ord("×"): "*", ord("÷"): "/", ord("−"): "-", ord("^"): "**"})
    if not _KNOWN.fullmatch(spelt):
        raise ValueError(ONLY)
    try:
        tree = ast.parse(spelt.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("this is no arithmetic expression") from None
    try:
        value = _value(tree.body)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    return str(value) if value.denominator == 1 else f"{float(value):.{DIGITS}g}"


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and math.isfinite(node.value):
        return _bounded(Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _BINARY:
            return _bounded(Fraction(_BINARY[type(node.op)](left, right)))
    raise ValueError(ONLY)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > 1000:
        raise ValueError("exponents are whole numbers of at most 1000")
    size = max(abs(base.numerator), base.denominator).bit_length()
    if size * abs(int(exponent)) > 4 * LARGEST.bit_length():
        raise ValueError("the value is too large")
    return _bounded(base ** int(exponent))


def _bounded(value: Any) -> Fraction:
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise ValueError("the value is too large")
    return value
