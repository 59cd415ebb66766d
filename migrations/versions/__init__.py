"""One file a schema change, in the order of their numbers. Expand first, contract in a later release."""
