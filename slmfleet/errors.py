"""Errors that a person reads: one sentence that says what is wrong and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a bad environment. Programs print the sentence, without a traceback, and exit with ``exit_code``.

    Exit codes: 1 the work failed, 2 the input was wrong (flags, configuration, manifests).
    """

    exit_code = 1


class UsageError(UserError):
    """The call or its configuration is wrong."""

    exit_code = 2
