"""The OpenAI-compatible front door of the fleet, and the choice of the replica that answers."""
