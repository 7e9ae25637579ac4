"""API keys, which a config names by their environment variables only."""

from __future__ import annotations

import os

from megatron_scope.errors import ConfigError


def api_key(setting: str, variable: str | None) -> str | None:
    """The key in `variable`, None where no variable is named; ConfigError, naming the `setting`, where it is
    not set.
    """
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ConfigError(f"{setting} names {variable}, which is not set; export it or unset the key")
    return os.environ[variable]
