"""Label selectors with Kubernetes' grammar: ``a=b``, ``a==b``, ``a!=b``, ``a in (b, c)``, ``a notin (b, c)``, ``a``,
``!a``, joined by commas, which mean "and".

As in Kubernetes, ``a!=b`` and ``a notin (b)`` also match what has no label ``a``, and the empty selector matches
everything (https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from controlplane.domain.names import check_label_key, check_label_value, printable

MAX_LENGTH = 4096
_TOKEN = re.compile(r"\s*(?:(?P<word>[A-Za-z0-9._/-]+)|(?P<sign>==|!=|[=!(),]))")


class SelectorError(ValueError):
    """The text is no selector; the sentence says where and what was expected."""


class Operator(StrEnum):
    """How a requirement looks at a label."""

    IN = "in"
    NOT_IN = "notin"
    EXISTS = "exists"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on one label; ``values`` are sorted, and empty for EXISTS and MISSING."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether ``labels`` fulfil the condition."""
        match self.operator:
            case Operator.IN:
                return labels.get(self.key) in self.values
            case Operator.NOT_IN:
                return labels.get(self.key) not in self.values
            case Operator.EXISTS:
                return self.key in labels
            case Operator.MISSING:
                return self.key not in labels

    def __str__(self) -> str:
        match self.operator:
            case Operator.EXISTS:
                return self.key
            case Operator.MISSING:
                return f"!{self.key}"
            case Operator.IN if len(self.values) == 1:
                return f"{self.key}={self.values[0]}"
            case Operator.NOT_IN if len(self.values) == 1:
                return f"{self.key}!={self.values[0]}"
            case _:
                return f"{self.key} {self.operator} ({', '.join(self.values)})"


@dataclass(frozen=True, slots=True)
class Selector:
    """All requirements must hold. ``str()`` gives a text that parses to an equal selector."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether something with ``labels`` is selected."""
        return all(requirement.matches(labels) for requirement in self.requirements)

    def __str__(self) -> str:
        return ",".join(map(str, self.requirements))


EVERYTHING = Selector()


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    position: int  # of its first character, from 1
    is_word: bool


def parse_selector(text: str) -> Selector:
    """The selector that ``text`` writes. Raises SelectorError with position and what was expected."""
    if len(text) > MAX_LENGTH:
        raise SelectorError(f"the selector has {len(text)} characters: at most {MAX_LENGTH} are allowed")
    if not text.strip():
        return EVERYTHING
    return _Parser(text).selector()


def _tokens(text: str) -> list[_Token]:
    tokens, end = [], 0
    while text[end:].strip():
        match = _TOKEN.match(text, end)
        if match is None:
            at = len(text) - len(text[end:].lstrip())
            sign = f'"{printable(text[at])}" at character {at + 1}'
            raise SelectorError(f'selector "{printable(text)}": {sign} is not allowed in a selector')
        is_word = match.lastgroup == "word"
        tokens.append(_Token(match[match.lastgroup or 0], match.start(match.lastgroup or 0) + 1, is_word))
        end = match.end()
    return tokens


class _Parser:
    """Recursive descent over the tokens; each method consumes what it names."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _tokens(text)
        self._next = 0

    def selector(self) -> Selector:
        requirements = [self._requirement()]
        while self._peek() is not None:
            self._sign(",")
            requirements.append(self._requirement())
        return Selector(tuple(requirements))

    def _requirement(self) -> Requirement:
        if self._at("!"):
            self._sign("!")
            return Requirement(self._key(), Operator.MISSING)
        key = self._key()
        token = self._peek()
        if token is None or token.text == ",":
            return Requirement(key, Operator.EXISTS)
        self._next += 1
        match token.text:
            case "=" | "==":
                return Requirement(key, Operator.IN, (self._value(),))
            case "!=":
                return Requirement(key, Operator.NOT_IN, (self._value(),))
            case "in":
                return Requirement(key, Operator.IN, self._values())
            case "notin":
                return Requirement(key, Operator.NOT_IN, self._values())
        self._next -= 1
        raise self._expected('"=", "!=", "in", "notin" or ","')

    def _values(self) -> tuple[str, ...]:
        self._sign("(")
        values = {self._value(required=True)}
        while not self._at(")"):
            self._sign(",", '"," or ")"')
            values.add(self._value(required=True))
        self._sign(")")
        return tuple(sorted(values))

    def _key(self) -> str:
        token = self._peek()
        if token is None or not token.is_word:
            raise self._expected("a label key")
        self._next += 1
        return self._checked(token, check_label_key)

    def _value(self, required: bool = False) -> str:
        token = self._peek()
        if token is None or not token.is_word:
            # `a=` asks for the empty value; in a list it would be a slip of the pen.
            if required or (token is not None and token.text != ","):
                raise self._expected("a value")
            return ""
        self._next += 1
        return self._checked(token, check_label_value)

    def _checked(self, token: _Token, check: Callable[[str], str]) -> str:
        try:
            return check(token.text)
        except ValueError as error:
            raise SelectorError(f'selector "{printable(self._text)}": at character {token.position}, {error}') from None

    def _peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _at(self, sign: str) -> bool:
        token = self._peek()
        return token is not None and token.text == sign

    def _sign(self, sign: str, expected: str = "") -> None:
        if not self._at(sign):
            raise self._expected(expected or f'"{sign}"')
        self._next += 1

    def _expected(self, what: str) -> SelectorError:
        token = self._peek()
        if token is None:
            return SelectorError(f'selector "{printable(self._text)}": expected {what} at its end')
        return SelectorError(
            f'selector "{printable(self._text)}": expected {what} at character {token.position}, found "{token.text}"'
        )
