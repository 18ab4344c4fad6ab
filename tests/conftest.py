"""Tests have caches of their own; the converters' environments, which take a minute to make, they share."""

import os

from edgedeploy.storage import cache_dir

os.environ.setdefault("EDGEDEPLOY_TOOLS_DIR", str(cache_dir() / "tools"))
