"""Tools of contributors; nothing here is installed."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""

RESULTS = ROOT / "bench-results"
"""Where tables and plots go; git ignores it."""
