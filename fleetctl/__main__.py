"""``python -m fleetctl``: the same as the ``fleetctl`` program."""

from fleetctl.cli import main

main()
