"""What all tests of conversions share."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Files of tests need not outlive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
