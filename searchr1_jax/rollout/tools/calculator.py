"""A calculator: `<calculate> (3 + 4) * 2 </calculate>` is answered with `14`."""

import ast
import math
import operator
import re

from searchr1_jax.rollout import environment

_LONGEST = 200  # characters
_DIGITS = 50  # before the decimal point, of whatever is computed on the way
_ALPHABET = re.compile(r"[\d\s.eE()*/+-]*", re.ASCII)
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_SIGNS = {ast.USub: operator.neg, ast.UAdd: operator.pos}


class Calculator:
    """Computes with + - * / ** and parentheses; what it cannot compute is answered with the reason."""

    name = "calculate"

    def call(self, calls: list[environment.Call]) -> list[str]:
        return [compute(call.content) for call in calls]


def compute(text: str) -> str:
    """The value of an expression, exact or of 12 significant digits, or "error: " and why it has none."""
    try:
        if len(text) > _LONGEST:
            raise _Error(f"longer than {_LONGEST} characters")
        if not _ALPHABET.fullmatch(text):
            raise _Error("use numbers, + - * / ** and parentheses only")
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except _Error as error:
        return f"error: {error}"
    except SyntaxError:
        return "error: this is not an expression"
    return str(value) if isinstance(value, int) else f"{value + 0:.12g}"  # + 0: there is no -0


class _Error(Exception):
    """Why an expression has no value, in words that the policy reads: the same with every version of Python."""


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value):
            pass
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _SIGNS:
            value = _SIGNS[type(op)](_value(operand))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _OPERATORS:
            value = _apply(op, _value(left), _value(right))
        case _:
            raise _Error("use numbers, + - * / ** and parentheses only")
    if not abs(value) < 10**_DIGITS:
        raise _Error(f"a number of more than {_DIGITS} digits")
    return value


def _apply(op: ast.operator, left: int | float, right: int | float) -> int | float:
    if isinstance(op, ast.Pow) and abs(left) > 1 and right * math.log10(abs(left)) > _DIGITS:
        raise _Error(f"a number of more than {_DIGITS} digits")  # before it is computed
    try:
        value = _OPERATORS[type(op)](left, right)
    except ZeroDivisionError:
        raise _Error("division by zero") from None
    except OverflowError:
        raise _Error(f"a number of more than {_DIGITS} digits") from None
    if isinstance(value, complex):
        raise _Error("an even root of a negative number")
    return value
