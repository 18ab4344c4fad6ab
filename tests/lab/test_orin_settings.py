"""A Jetson's governor is set over SSH on an aarch64 board, and is as it was when the session ends or is taken away."""

from __future__ import annotations

import pytest

from edgedeploy.errors import LeaseLost
from edgedeploy.lab import bundle, leases
from edgedeploy.lab.inventory import open_transport
from edgedeploy.records.device import DeviceSettings
from tests.testbed.hybrid import Hybrid


def governors(orin: Hybrid) -> set[str]:
    """Return what the board's own shell says."""
    with open_transport("orin", orin.device()) as transport:
        said = transport.run(
            ["sh", "-c", "grep -h . /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"], timeout_s=30
        )
    return set(said.stdout.decode().split())


def test_governor_is_set_for_the_session_and_restored_by_the_board_when_it_is_taken_away(orin: Hybrid) -> None:
    (was,) = governors(orin)
    assert was != "performance"
    # An emulated Python that compiles the runner takes its time on a busy machine.
    settings = DeviceSettings(governor="performance", fixed_clocks=True)
    device = orin.device(settings=settings, timeout_s=120.0)
    with open_transport("orin", device) as transport:
        with bundle.connect(transport, device, device_name="orin") as agent:
            assert agent.settings_applied["governor"] == "performance"
            assert governors(orin) == {"performance"}
        assert governors(orin) == {was}
        with bundle.connect(transport, device, device_name="orin") as agent:
            released = leases.release(transport, device, leases.read(transport, device).token)
            assert (released.has_ended, released.state) == (True, "free")
            assert governors(orin) == {was}
            with pytest.raises(LeaseLost, match="by force"):
                agent.conditions()
