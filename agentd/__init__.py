"""The node daemon: hosts small-language-model agents on one device, with or without a network."""
