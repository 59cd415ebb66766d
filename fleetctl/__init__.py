"""The operator's command line, over REST alone."""
