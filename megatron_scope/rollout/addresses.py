"""The servers' addresses: a list that stays, or a file that may change while the pool runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_scope.errors import ConfigError
from megatron_scope.rollout.wire import one_line


class AddressBook:
    """URLs of rollout servers, from `urls` or from `file`: one a line, blank lines and # comments left out.

    A file's change counts once two looks at it in a row agree and every line is a URL, so that one caught in
    the middle of being written is not taken for the end of all servers.
    """

    def __init__(self, urls: Sequence[str] = (), *, file: Path | None = None) -> None:
        self._file = file
        self._current = tuple(url.rstrip("/") for url in urls) if file is None else _read(file)
        self._seen = self._current
        self._trouble: str | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers as last known."""
        return self._current

    def look(self) -> str | None:
        """Looks at the file again; returns what is new and wrong with it, once, and keeps the list then."""
        if self._file is None:
            return None
        try:
            seen = _read(self._file)
        except ConfigError as error:
            is_news, self._trouble = str(error) != self._trouble, str(error)
            return f"{error}; the servers stay as they were" if is_news else None
        self._trouble = None
        if seen == self._seen:
            self._current = seen
        self._seen = seen
        return None


def _read(file: Path) -> tuple[str, ...]:
    """The URLs in `file`, each once and in order; ConfigError where it cannot be read or has none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"rollout.servers_file {file} cannot be read ({one_line(error)}); expected one server URL a line"
        ) from error
    urls = [line.partition("#")[0].strip().rstrip("/") for line in lines]
    urls = [url for url in urls if url]
    bad = next((url for url in urls if not url.startswith(("http://", "https://"))), None)
    if bad is not None or not urls:
        got = "no address" if bad is None else repr(bad)
        raise ConfigError(
            f"rollout.servers_file {file} has {got}; expected one server URL a line, as in http://HOST:30000"
        )
    return tuple(dict.fromkeys(urls))
