"""Collects the tests, and gives them the fixtures of shared_fixtures.py."""

import gc
import importlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from fidelity_page import named_tests


def __getattr__(name):
    """Return a list or function of shared_fixtures.py, which is imported where tests run."""
    if name not in ("LINEAR_METHODS", "METHODS", "perturb"):
        raise AttributeError(name)
    return getattr(importlib.import_module("shared_fixtures"), name)


def pytest_configure(config):
    """Import the fixtures, and with them PyTorch, in a process that runs tests.

    With `-n`, the first process only starts the workers, and waits for them.
    """
    starts_workers = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if not starts_workers:
        # Collecting makes a million objects that all stay.
        gc.disable()
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_finish():
    """Leave what was imported and collected out of garbage collection from now on."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests that docs/fidelity.md names, but for their long rows, which are tables.

    `-m fidelity` runs them and no others.
    """
    tests = named_tests()
    for item in items:
        is_named = (item.path.name, getattr(item, "originalname", item.name)) in tests
        if is_named and item.get_closest_marker("tables") is None:
            item.add_marker(pytest.mark.fidelity)
