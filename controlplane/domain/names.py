"""What may be a name, a label key, a label value, a version or a digest, and the nearest known name for a typing error.

Grammar: names are DNS labels (RFC 1123); label keys and values follow Kubernetes
(https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
VERSION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,62}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"

_NAME = re.compile(NAME_PATTERN[1:-1])
_VERSION = re.compile(VERSION_PATTERN[1:-1])
_SHA256 = re.compile(SHA256_PATTERN[1:-1])
_LABEL_WORD = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")


def check_name(value: str) -> str:
    """``value``, if it is a DNS label; ValueError with a sentence otherwise."""
    if _NAME.fullmatch(value):
        return value
    raise ValueError(
        f"{shown(value)} is no name: write 1 to 63 lower-case letters, digits and hyphens, "
        "with a letter or digit first and last"
    )


def check_version(value: str) -> str:
    """``value``, if it can be the version of a model; ValueError with a sentence otherwise."""
    if _VERSION.fullmatch(value):
        return value
    raise ValueError(
        f"{shown(value)} is no version: write 1 to 63 letters, digits, '.', '_', '+' and '-', "
        "with a letter or digit first"
    )


def check_sha256(value: str) -> str:
    """``value`` in lower case, if it is a hex SHA-256; ValueError with a sentence otherwise."""
    if _SHA256.fullmatch(value.lower()):
        return value.lower()
    raise ValueError(f"{shown(value)} is no SHA-256: write its 64 hex digits")


def check_label_key(value: str) -> str:
    """``value``, if it is a label key: ``[DNS subdomain "/"] word``; ValueError with a sentence otherwise."""
    prefix, slash, word = value.rpartition("/")
    prefix_is_good = not slash or (len(prefix) <= 253 and _DNS_SUBDOMAIN.fullmatch(prefix))
    if _LABEL_WORD.fullmatch(word) and prefix_is_good:
        return value
    raise ValueError(
        f"{shown(value)} is no label key: write 1 to 63 letters, digits, '-', '_' and '.', "
        "with a letter or digit first and last, such as site or example.com/site"
    )


def check_label_value(value: str) -> str:
    """``value``, if it is a label value (a word, or empty); ValueError with a sentence otherwise."""
    if not value or _LABEL_WORD.fullmatch(value):
        return value
    raise ValueError(
        f"{shown(value)} is no label value: write up to 63 letters, digits, '-', '_' and '.', "
        "with a letter or digit first and last"
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was most likely meant to be; None when nothing is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower().replace("_", ""), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def shown(value: object, limit: int = 80) -> str:
    """``value`` in quotes for a sentence: on one line, cut at ``limit`` characters."""
    text = printable(str(value))
    return '"' + (text if len(text) <= limit else text[: limit - 1] + "…") + '"'


def printable(text: str) -> str:
    """``text`` with line breaks, control characters and the like as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
