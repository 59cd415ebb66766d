"""Who this node is: a key made here, a certificate for it, and the authorities it trusts."""
