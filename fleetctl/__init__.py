"""The operator's command line. It knows the control plane through REST alone."""
