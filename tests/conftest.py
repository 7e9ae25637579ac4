import contextlib
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.helpers.ranks import RankPool


def pytest_configure() -> None:
    # A shell starts what runs in the background with SIGINT ignored, and every child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], RankPool]]:
    """`pool(n)` gives the session's pool of n ranks, started at its first use."""
    with contextlib.ExitStack() as stack:
        pools: dict[int, RankPool] = {}

        def get(size: int) -> RankPool:
            if size not in pools or pools[size].closed:
                pools[size] = RankPool(size)
                stack.callback(pools[size].close)
            return pools[size]

        yield get
