"""Devices for tests behind one interface: Plain (sshd), Hybrid (arm64 programs under qemu), Vm (a machine of its own).

In tests/lab the session fixtures `hybrid` and `vm` give a running device; anywhere else a device is a context manager:

    from tests.testbed.hybrid import Hybrid          # root only; built on first use (2 minutes, then cached)
    with Hybrid("orin", user="root") as board:       # or "pi4"; user "pi" by default; starts in 0.1 to 0.5 s
        with board.transport() as transport: ...     # our SshTransport; board.device(timeout_s=5) is its record
        board.ssh("uname", "-m", user="root")        # OpenSSH's client, when ours is not what is tested
        board.identity.heat(85.0)                    # also throttle(), governors(), renew_boot_id()
        board.path("/home/pi/notes").read_text()     # its files, seen from here
        board.cut(); board.freeze(); board.thaw()    # kill connections; stop sshd, whose kernel still acknowledges
        lab_toml.write_text('format = "edgedeploy.lab/1"\n' + board.entry(target="arm64-linux"))

    from tests.testbed.plain import Plain            # any user; several at once, each with root and lease_dir of its own
    with Plain(tmp_path / "board") as board: ...     # also start("otherhost"), accept(key), new_key(name); start, stop again

    from tests.testbed.vm import Vm                  # its own kernel, boot_id, memory and disk
    with Vm(memory_mib=1024, cores=1) as board:      # from a snapshot; Vm(snapshot=False) boots
        board.freeze(); board.unplug(); board.plug(); board.power_cut(); board.reboot(); board.identify("pi4")

    from tests.testbed.badlink import BadLink        # a bad link in front of any of them
    with BadLink(board.port, delay_s=0.05) as link:
        board.transport(**link.settings(board))       # stall(), resume(), cut(), half_open(), refuse(), admit()

`python -m tests.testbed build|up|down|status` is the same for a person (`make lab-up`, `make lab-down`). Everything is kept
under EDGEDEPLOY_TESTBED_DIR (default ~/.cache/edgedeploy-testbed); `archives/` there is what is worth caching elsewhere.
"""
