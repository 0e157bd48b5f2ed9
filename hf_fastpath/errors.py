"""The one exception that says "not on this model, layer or machine", in words a user can act on."""

from __future__ import annotations


class Unsupported(ValueError):
    """Raised when something cannot be done here. The message names what was wrong and what is allowed."""
