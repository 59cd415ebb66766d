"""docs/configuration.md says what the programs read."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_settings_is_current() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs/generate.py", "--check"], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 0, "run: .venv/bin/python docs/generate.py"
