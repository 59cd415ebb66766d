"""The central server: keeps the fleet's state, hands out work, rolls changes out and fronts requests."""
