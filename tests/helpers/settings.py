"""Configs of tests as mappings of sections."""

from __future__ import annotations

from typing import Any


def changed(settings: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """The settings with some keys of some sections replaced."""
    return {**settings, **{name: {**settings.get(name, {}), **values} for name, values in sections.items()}}
