"""What the tests share: servers to test against, child processes, waiting for events."""
