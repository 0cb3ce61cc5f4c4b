"""Whether two of sympy's objects are equal: math-verify's judgement, without its rounding.

math-verify rounds decimals to six places, and takes for nothing what is below 1e-15: good for homework, but
as a reward it pays for 0.333333 where 1/3 is asked for, and for 1/2006! where 1/2004! is. Here numbers are
compared as numbers, and what it finds equal is held to the values at one point.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from latex2sympy2_extended import is_expr_of_only_symbols
from math_verify import verify
from sympy import (
    Abs,
    Add,
    And,
    Basic,
    Derivative,
    Eq,
    FiniteSet,
    Float,
    I,
    Integer,
    Interval,
    Mul,
    Or,
    Pow,
    Rational,
    Set,
    Symbol,
    Tuple,
    Union,
    simplify,
)
from sympy.core.expr import Expr, UnevaluatedExpr
from sympy.core.function import AppliedUndef
from sympy.core.numbers import ImaginaryUnit, NumberSymbol
from sympy.core.relational import Relational
from sympy.matrices import MatrixBase

_DIGITS = 100  # that irrational numbers are computed to
_EQUAL = Rational(1, 10**90)  # relative difference of those that are equal

_UNKNOWNS = frozenset("xyz")  # that no quantity is asked for by: x + y = 5 is a line, m + n = 5 an answer

_AS_WRITTEN = "_unsorted_args"  # of math-verify's own sets: their members, in the order they were written in


def exact(thing: Any) -> Any:
    """The same with decimals as the fractions they are, a percent as a hundredth, and i imaginary."""
    if isinstance(thing, MatrixBase):
        return thing.applyfunc(exact)
    if not isinstance(thing, Basic):
        return thing
    if hasattr(thing, _AS_WRITTEN):
        return thing.func(*map(exact, getattr(thing, _AS_WRITTEN)))
    instead: dict[Any, Any] = {each: Rational(str(each)) for each in thing.atoms(Float) if each.is_finite}
    instead |= {each: each.args[0] for each in thing.atoms(UnevaluatedExpr)}
    instead |= {each: I for each in _free(thing) if each.name == "i" and not each.is_real}
    return thing.xreplace(instead) if instead else thing


def equal(gold: Any, said: Any) -> bool:
    """Of what `exact` gave. Raises whatever sympy raises, and may take for ever."""
    if _is_number(gold) and _is_number(said):
        return _same_number(gold, said)
    if any(type(each) in (And, Or) for each in (gold, said)):
        gold, said = _holding(gold, said), _holding(said, gold)
        if gold is None or said is None:
            return False
    gold, said = _united(gold, said), _united(said, gold)
    gold, said = _row(gold, said), _row(said, gold)
    gold, said = _named(gold, said), _named(said, gold)
    if _has_equation(gold) != _has_equation(said):
        gold, said = _valued(gold), _valued(said)
        if gold is None or said is None:
            return False
    found = verify(gold, said, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
    return bool(found) and not _differ(gold, said)


def _holding(thing: Any, other: Any) -> Any:
    """The set that a condition on one unknown holds in, the same unknown as the other's; None of all else."""
    if isinstance(thing, Set):
        return thing
    if isinstance(thing, Eq) and isinstance(thing.rhs, Set) and isinstance(thing.lhs, Symbol):
        return thing.rhs
    if not isinstance(thing, Relational | And | Or) or len(_free(thing)) != 1:
        return None
    unknown = _free(other) if isinstance(other, Relational | And | Or) else set()
    return thing.as_set() if unknown <= _free(thing) else None


def _united(thing: Any, other: Any) -> Any:
    """Intervals in a row as the one set they are, where the other is a union."""
    if isinstance(other, Union) and isinstance(thing, FiniteSet):
        return Union(*thing.args) if all(isinstance(each, Interval) for each in thing.args) else thing
    return thing


def _row(thing: Any, other: Any) -> Any:
    """A row or a column as a tuple where the other is one, and a pair as one where the other is a matrix."""
    entries = _entries(thing)
    if isinstance(other, MatrixBase) and entries is not None:
        return Tuple(*entries)
    is_row = isinstance(thing, MatrixBase) and 1 in thing.shape and _entries(other) is not None
    return Tuple(*thing.flat()) if is_row else thing


def _named(thing: Any, other: Any) -> Any:
    """Values as the other names them: x = y = 0 of a pair, and the roots x_1 = 1, x_2 = 3 as those of x."""
    parts = _equations(thing) if isinstance(thing, And | FiniteSet) else []
    if not all(isinstance(each, Eq) and isinstance(each.lhs, Symbol) for each in parts):
        return thing
    values = [each.rhs for each in parts if not _free(each.rhs)]
    if isinstance(thing, And):
        is_one = len(values) == 1 and len(_free(thing)) == len(parts) and _entries(other) is not None
        return Tuple(*values * len(parts)) if is_one else thing
    if len(values) < len(parts) or not _has_equation(other) or len(_free(other)) != 1:
        return thing
    (name,) = _free(other)
    numbered = re.compile(rf"{re.escape(name.name)}_\{{?\d{{1,9}}\}}?")
    is_numbered = all(numbered.fullmatch(each.lhs.name) for each in parts)
    return FiniteSet(*(Eq(name, each) for each in values)) if is_numbered and parts else thing


def _entries(thing: Any) -> list[Any] | None:
    """Those of a tuple: math-verify reads a pair as an open interval."""
    if isinstance(thing, Interval):
        return [thing.start, thing.end] if thing.left_open and thing.right_open else None
    return list(thing.args) if isinstance(thing, Tuple) else None


def _equations(thing: Any) -> list[Any]:
    return list(getattr(thing, _AS_WRITTEN, thing.args))


def _has_equation(thing: Any) -> bool:
    return isinstance(thing, Eq) or (
        isinstance(thing, And | FiniteSet | Tuple) and any(map(_has_equation, thing.args))
    )


def _valued(thing: Any) -> Any:
    """`thing` with what is named put for each of its equations; None where one names nothing: x + 2 = 5."""
    if isinstance(thing, Eq):
        if _is_number(thing.lhs) and isinstance(thing.rhs, Symbol):
            return thing.lhs
        return thing.rhs if _is_name(thing.lhs) or _is_identity(thing) else None
    if not _has_equation(thing):
        return thing
    parts = _equations(thing)
    if isinstance(thing, And):
        if not all(isinstance(each, Eq) for each in parts):
            return None
        ends = _ends(parts)
        # Steps in a row, 48/2 = 24 + 5 = 29, which nobody means as equations.
        are_steps = all(_is_number(side) for each in parts for side in (each.lhs, each.rhs))
        return ends.rhs if are_steps else _valued(ends)
    values = [_valued(each) for each in parts]
    if None in values:
        return None
    names = {each.lhs for each in parts if isinstance(each, Eq)}
    return (thing.func if len(set(values)) == len(values) or len(names) < 2 else Tuple)(*values)


def _ends(chain: Sequence[Any]) -> Any:
    """a = c, of a = b = c, in whatever order sympy has put its equations."""
    lefts, rights = [each.lhs for each in chain], [each.rhs for each in chain]
    first = next((each for each in lefts if each not in rights), lefts[0])
    last = next((each for each in reversed(rights) if each not in lefts), rights[-1])
    return Eq(first, last, evaluate=False)


def _is_identity(equation: Any) -> bool:
    """Whether it says what something comes to: 3 + 4 = 7, whatever x is."""
    left, right = equation.lhs.doit(), equation.rhs
    return isinstance(left, Expr) and isinstance(right, Expr) and _same_at_a_point(left, right) is True


def _is_name(thing: Any) -> bool:
    """Whether an equation with `thing` on its left says a value: of an unknown, a function's, a length AB or
    a sum m + n. Of 2x, or x + y, it says none."""
    if isinstance(thing, Tuple):
        return all(map(_is_name, thing.args))
    if isinstance(thing, Symbol | AppliedUndef | Derivative | NumberSymbol | ImaginaryUnit):
        return True  # e is an ellipse's eccentricity, and I a current
    if isinstance(thing, Pow) and isinstance(thing.base, AppliedUndef) and thing.exp == -1:
        return True  # an inverse function
    inner = thing.args[0] if isinstance(thing, Abs) else thing
    if isinstance(inner, Symbol):
        return len(inner.name) > 1  # of an accent: a vector's length
    names = {each.name for each in _free(inner)}
    is_plain = isinstance(inner, Add | Mul | Pow) and is_expr_of_only_symbols(inner.subs(-1, 1))
    return is_plain and len(names) > 1 and names.isdisjoint(_UNKNOWNS)


def _free(thing: Any) -> set[Any]:
    return set(getattr(thing, "free_symbols", ()))


def _is_number(thing: Any) -> bool:
    return isinstance(thing, Expr) and bool(thing.is_number)


def _same_number(a: Any, b: Any) -> bool:
    a, b = a.doit(), b.doit()
    if a == b:
        return True
    if all(isinstance(each, Rational) or each.is_infinite for each in (a, b)):
        return False
    if 0 in (a, b):
        return bool(simplify(a - b) == 0)
    a, b = a.evalf(_DIGITS), b.evalf(_DIGITS)
    return bool(abs(a - b) <= _EQUAL * abs(b))


def _differ(a: Any, b: Any) -> bool:
    """Whether two that math-verify finds equal have other values: those of their parts, or at a point."""
    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        return any(_differ(*each) for each in zip(a.flat(), b.flat(), strict=True))
    if isinstance(a, Relational) and isinstance(b, Relational):
        return type(a) is type(b) and a.lhs == b.lhs and _differ(a.rhs, b.rhs)
    of_a, of_b = _parts(a), _parts(b)
    if of_a is not None and of_b is not None:
        if isinstance(a, FiniteSet) and isinstance(b, FiniteSet):
            return any(all(_differ(one, other) for other in of_b) for one in of_a)
        return len(of_a) == len(of_b) and any(_differ(*each) for each in zip(of_a, of_b, strict=True))
    if isinstance(a, Expr) and isinstance(b, Expr):
        return _same_at_a_point(a, b) is False
    return False


def _same_at_a_point(a: Expr, b: Expr) -> bool | None:
    point = _point(a, b)
    at_a, at_b = a.xreplace(point), b.xreplace(point)
    return _same_number(at_a, at_b) if _is_number(at_a) and _is_number(at_b) else None


def _parts(thing: Any) -> list[Any] | None:
    if isinstance(thing, Interval):
        return [thing.start, thing.end]
    if isinstance(thing, FiniteSet):
        return list(getattr(thing, _AS_WRITTEN, thing.args))
    return list(thing.args) if isinstance(thing, Tuple) else None


def _point(*things: Any) -> dict[Any, Any]:
    """A value for every unknown, of the same name the same: none of them nice."""
    symbols = {symbol for thing in things for symbol in _free(thing)}
    names = sorted({symbol.name for symbol in symbols})
    return {symbol: Integer(17 + 12 * names.index(symbol.name)) / 13 for symbol in symbols}
