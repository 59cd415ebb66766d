"""The worker: a child process in which one model lives. ``python -m agentd.models.worker --fd N``."""
