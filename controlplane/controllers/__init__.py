"""Loops that load state, ask ``controlplane.domain`` what to do, and apply it in one fenced transaction."""

from controlplane.controllers.manager import Controllers

__all__ = ["Controllers"]
