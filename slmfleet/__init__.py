"""The common ground of the three programs: the wire contract (``slmfleet.v1``, generated) and plain values.

Nothing here knows of ``agentd``, ``controlplane`` or ``fleetctl``; nothing here does I/O except reading a
configuration file or the header of a model's file, and writing a log line.
"""

__version__ = "0.1.0"
