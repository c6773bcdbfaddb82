"""Where tables are printed."""

import os

from rich.console import Console


def console() -> Console:
    """As wide as the terminal; in a file or a pipe, which has no width, as wide as any table."""
    found = Console()
    if found.is_terminal or found.is_jupyter or "COLUMNS" in os.environ:
        return found
    return Console(width=240)
