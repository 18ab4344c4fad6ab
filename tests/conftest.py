"""Tests have caches, leases and state of their own, share the converters' environments, and repeat their examples."""

import os
import shutil
import signal
import tempfile

import pytest
from hypothesis import settings

from edgedeploy.storage import cache_dir

# A change is not refused for an example that it did not bring; EDGEDEPLOY_TEST_RANDOM=1 looks for new ones, and longer.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("searching", max_examples=1000, deadline=None)
settings.load_profile("searching" if os.environ.get("EDGEDEPLOY_TEST_RANDOM") else "repeatable")

# They take a minute to make.
os.environ.setdefault("EDGEDEPLOY_TOOLS_DIR", str(cache_dir() / "tools"))

# Each test process measures on a machine of its own, as far as leases and quarantine go.
_OWN = tempfile.mkdtemp(prefix="edgedeploy-tests-")
os.environ["EDGEDEPLOY_LEASE_DIR"] = f"{_OWN}/lease"
os.environ["EDGEDEPLOY_STATE_DIR"] = f"{_OWN}/state"


# A shell's background job ignores Ctrl-C, and what it starts inherits that; tests interrupt what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config):
    """Delete what this test process kept."""
    shutil.rmtree(_OWN, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Leave out what only shows that other tools lose what we keep: it can change by their releases alone."""
    if not os.environ.get("EDGEDEPLOY_TEST_PEERS"):
        for item in items:
            if "peers" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="opt in with EDGEDEPLOY_TEST_PEERS=1"))
