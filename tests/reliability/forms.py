"""The forms of these tests, by ``SLMFLEET_LONGHAUL``: unset, the short one of `make test` (under a minute in all);
``short``, the whole of it with time compressed 60 times (`make longhaul`); ``real``, in real time (`make longhaul
REAL=1`)."""

from __future__ import annotations

import os

import pytest

FORM = os.environ.get("SLMFLEET_LONGHAUL", "")
LONG = bool(FORM)
long_only = pytest.mark.skipif(not LONG, reason="takes long: run `make longhaul`")
