"""Where the repository lies, and the real data and adapters beside it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
VERSION_1 = Path(__file__).parent / "version_1"
"""Files of format version 1: a mixture that a fit made, and the manifests of its three exports."""
