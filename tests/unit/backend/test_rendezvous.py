"""The store that servers and sending ranks meet at."""

from __future__ import annotations

import socket

import pytest

from megatron_scope.backend import rendezvous
from megatron_scope.errors import SyncError


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("chosen", [False, True])
def test_what_one_side_says_the_other_hears(chosen):
    port = free_port() if chosen else 0
    store = rendezvous.listen(port)
    assert store.port == port or not chosen
    rendezvous.connect("127.0.0.1", store.port).set("key", "value")
    assert store.get("key") == b"value"


def test_a_port_that_is_taken_is_one_line_with_the_way_out():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(SyncError, match=f"^port {port} of rank 0's host cannot be taken ") as caught:
            rendezvous.listen(port)
    assert str(caught.value).endswith("set sync.master_port to a free one, or to 0")
    assert "\n" not in str(caught.value)


def test_a_store_that_cannot_be_reached_is_one_line_with_the_way_out():
    port = free_port()
    with pytest.raises(SyncError, match=f"^rank 0's store at 127.0.0.1:{port}, .*refused") as caught:
        rendezvous.connect("127.0.0.1", port)
    assert str(caught.value).endswith("open that port, or set sync.master_port to one that is open")
    assert "\n" not in str(caught.value)
