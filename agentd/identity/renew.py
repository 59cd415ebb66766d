"""``python -m agentd.identity.renew STATE_DIR``: renew the certificate and end. The daemon's short-lived child."""

from __future__ import annotations

import sys
from pathlib import Path

from agentd.identity.enroll import renew
from slmfleet.errors import UserError


def main() -> int:
    """Exit code 0, or another with one sentence on standard error."""
    try:
        renew(Path(sys.argv[1]))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
