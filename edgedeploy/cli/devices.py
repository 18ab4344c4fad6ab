"""devices list | show | passport | check | add | remove | provision: the physical devices of the lab file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edgedeploy.cli import console
from edgedeploy.documents import as_document, to_builtins


@click.group()
def devices_command() -> None:
    """Show the physical devices that can be reached."""


@devices_command.command("list", epilog="Example: edgedeploy devices list --lab lab.toml")
@console.lab_option
@click.option("--offline", is_flag=True, help="Print what the lab file says, and reach no device.")
@console.results_option
@console.json_option
def list_devices(lab: Path | None, offline: bool, results: Path, as_json: bool) -> None:
    """List every device of the lab file, and `local`, with who has it and how noisy it is. None is taken for it."""
    from edgedeploy import catalogue
    from edgedeploy.lab import health
    from edgedeploy.render.noise import summary_text

    devices = catalogue.devices(lab)
    if offline:
        _list_entries(devices, as_json)
        return
    surveyed, quarantined = catalogue.survey(lab), health.quarantined()
    states = {name: _state_words(surveyed[name], quarantined.get(name)) for name in devices}
    known = {name: _noise_of(name, results) for name in devices}
    console.print_list(
        "devices",
        ("device", "kind", "where", "state", "noise"),
        [
            [name, one.target, _where(one), states[name], summary_text(known[name]) or "no passport"]
            for name, one in devices.items()
        ],
        [
            {
                "name": name,
                **to_builtins(one),
                **_state_document(surveyed[name], quarantined.get(name)),
                "passport": _passport_document(known[name]),
            }
            for name, one in devices.items()
        ],
        as_json,
    )


def _where(device: Any) -> str:
    if device.transport == "local":
        return "this machine"
    if device.transport == "labgrid":
        return f"place {device.place} of labgrid"
    user = f"{device.user}@" if device.user else ""
    return f"{user}{device.host}:{device.port}" if device.port else f"{user}{device.host}"


def _state_words(surveyed: Any, quarantined: Any) -> str:
    lease, words = surveyed.lease, ""
    if lease is None:
        words = f"unreachable: {_short(surveyed.problem)}"
    elif lease.state == "held":
        until = f", for {lease.expires_s:.0f} s unless renewed" if lease.expires_s else ""
        words = f"held by {_short(lease.holder)}{until}"
    else:
        words = {"free": "free", "ending": f"being given back by {_short(lease.holder)}"}[lease.state]
    if lease is not None and lease.queue:
        words += f"; {len(lease.queue)} waiting"
    return f"quarantined: {_short(quarantined.why)} ({words})" if quarantined else words


def _state_document(surveyed: Any, quarantined: Any) -> dict[str, Any]:
    lease = surveyed.lease
    return {
        "state": lease.state if lease else "unreachable",
        "problem": surveyed.problem,
        "holder": lease.holder if lease else "",
        "held_s": lease.held_s if lease and lease.holder else None,
        "expires_s": lease.expires_s if lease and lease.holder else None,
        "queue": list(lease.queue) if lease else [],
        "quarantined": quarantined.why if quarantined else "",
    }


def _short(text: str) -> str:
    """Return what a device said as a piece of one line."""
    from edgedeploy.render.figures import one_line

    line = one_line(text)
    return line if len(line) <= 100 else line[:99] + "…"


def _list_entries(devices: Any, as_json: bool) -> None:
    console.print_list(
        "devices",
        ("device", "transport", "host", "user", "description"),
        [
            [name, one.transport, f"{one.host}:{one.port}" if one.port else one.host, one.user, one.description]
            for name, one in devices.items()
        ],
        [{"name": name, **to_builtins(one)} for name, one in devices.items()],
        as_json,
    )


@devices_command.command("places", epilog="Example: edgedeploy devices places --lab lab.toml")
@console.lab_option
@console.json_option
def list_places(lab: Path | None, as_json: bool) -> None:
    """List the places of the lab file's labgrid coordinators: who holds each, and which device it is."""
    from edgedeploy import catalogue
    from edgedeploy.lab.labgrid import told, told_holder

    rows, documents = [], []
    for coordinator, place, devices in catalogue.places(lab):
        services = [f"{one.user}@{one.address}:{one.port}" for one in place.services]
        holder = told_holder(place.holder)
        rows.append([told(place.name), ", ".join(devices), holder or "free", ", ".join(services), place.comment])
        documents.append(
            {
                "place": place.name,
                "coordinator": coordinator,
                "devices": list(devices),
                "holder": holder,
                "ssh": services,
                "comment": place.comment,
            }
        )
    console.print_list("places", ("place", "device", "held by", "SSH", "comment"), rows, documents, as_json)


@devices_command.command("release", epilog="Example: edgedeploy devices release orin-desk-2 --force")
@click.argument("name")
@click.option("--force", is_flag=True, help="Take it from its holder, whose session fails.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@console.lab_option
@console.json_option
def release_device(name: str, force: bool, yes: bool, lab: Path | None, as_json: bool) -> int:
    """Say who has a device and what taking it away would break; with --force, take it away."""
    from edgedeploy import catalogue
    from edgedeploy.errors import DeviceBusy, UsageError

    entry = catalogue.device(name, lab)
    lease = catalogue.lease_of(name, entry)
    if lease.state == "free":
        _tell_release(name, f"{name} is free; there is nothing to release", False, False, as_json)
        return 0
    if entry.transport == "labgrid":
        broken = f"{name} is the place {entry.place} of labgrid, which {_short(lease.holder)} has acquired"
    else:
        broken = _what_would_break(name, lease)
    if not force:
        raise DeviceBusy(f"{broken}; take it away nevertheless with --force")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{broken}; nobody is here to be asked, so say --yes")
        click.confirm(f"{broken}. Take it away?", abort=True, err=True)
    if entry.transport == "labgrid":
        was = catalogue.release_place(entry)
        _tell_release(name, f"the place {entry.place} is released; {was} had acquired it", True, True, as_json)
        return 0
    found = catalogue.release(name, entry, lease.token)
    said = (
        f"{name} is released: what ran there has ended, and what was set there is as it was"
        if found.has_ended
        else f"{name} is released: its holder can start nothing there any more. What it runs has not ended yet, being "
        f"another user's or frozen; it ends when it notices, or when that user or root of the device ends it"
    )
    _tell_release(name, said, True, found.has_ended, as_json)
    return 0


def _tell_release(name: str, said: str, released: bool, has_ended: bool, as_json: bool) -> None:
    if as_json:
        document = {"name": name, "released": released, "has_ended": has_ended, "message": said}
        console.print_json({"format": "edgedeploy.device_release/1", **document})
    else:
        click.echo(said, err=True)


def _what_would_break(name: str, lease: Any) -> str:
    minutes_s = f"{lease.held_s / 60:.0f} min" if lease.held_s >= 120 else f"{lease.held_s:.0f} s"
    runs = f"runs {', '.join(map(_short, lease.visits))}" if lease.visits else "runs no visit at the moment"
    waiting = f"; {len(lease.queue)} are waiting for it, who come first then" if lease.queue else ""
    return f"{name} is held by {_short(lease.holder)} for {minutes_s} and {runs}; that session would fail{waiting}"


@devices_command.command("show", epilog="Example: edgedeploy devices show local")
@click.argument("name")
@console.lab_option
@console.results_option
@console.json_option
def show_device(name: str, lab: Path | None, results: Path, as_json: bool) -> None:
    """Show how a device is reached, without reaching it, and what its newest passport says."""
    from edgedeploy import catalogue
    from edgedeploy.render.noise import device_line

    entry, known = catalogue.device(name, lab), _noise_of(name, results)
    if as_json:
        console.print_json({**as_document(entry), "passport": _passport_document(known)})
        return
    console.print_record(entry, as_json)
    if known is not None:
        click.echo(f"noise of {device_line(known)}")
    else:
        click.echo(f"noise: not known; edgedeploy devices passport {name} measures it")


def _noise_of(name: str, results: Path) -> Any:
    """Return what the newest passport of a device says; None where it has none."""
    from edgedeploy.results import Results

    store = Results(results)
    if not store.passport_files(name):  # what it is judged with takes a while to import
        return None
    from edgedeploy import passports

    return passports.newest_summary(name, store)


def _passport_document(summary: Any) -> Any:
    return to_builtins(summary) if summary is not None else None


@devices_command.command(
    "passport",
    epilog="""\b
Examples:
  edgedeploy devices passport local --minutes 5
  edgedeploy devices passport pi-3 --artifact build/int8     how noisy it is with this artifact
""",
)
@click.argument("name", metavar="DEVICE")
@click.option("--minutes", type=click.FloatRange(0, 24 * 60, min_open=True), default=5.0, show_default=True)
@click.option(
    "--artifact", type=click.Path(path_type=Path), help="A folder that compile wrote. [default: a small fixed network]"
)
@click.option("--backend", default="", help="Of the small network. [default: onnxruntime, if the device has it]")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides the order of bursts.")
@console.lab_option
@console.wait_option
@console.results_option
@console.quiet_option
@console.json_option
def passport_device(name: str, quiet: bool, as_json: bool, **given: Any) -> None:
    """Measure one artifact against itself on a device: it says how noisy that is, and what it can show in which time.

    The passport is kept in --results; `gate` and `run` warn by it, and `run --budget` plans by it.
    """
    from edgedeploy import passports
    from edgedeploy.render.noise import fitness_text, passport_rows

    request = passports.PassportRequest(device=name, **given)
    passport, path = passports.take_passport(request, console.progress(quiet))
    if as_json:
        console.print_json({**as_document(passport), "path": str(path)})
        return
    console.print_table(f"Passport of {name}", ("", "what it says"), passport_rows(passport))
    click.echo(fitness_text(passport))
    click.echo(f"passport: {path}")


@devices_command.command("quarantine", epilog='Example: edgedeploy devices quarantine pi-3 --why "the fan is broken"')
@click.argument("name")
@click.option("--why", default="", help="What is wrong with it; for whoever asks.")
@click.option("--lift", is_flag=True, help="Let it be used again.")
@console.lab_option
@console.json_option
def quarantine_device(name: str, why: str, lift: bool, lab: Path | None, as_json: bool) -> None:
    """Keep a device out of every run, or with --lift let it in again; a run does so itself with one that fails."""
    from edgedeploy import catalogue
    from edgedeploy.errors import UsageError
    from edgedeploy.lab import health

    if lift:
        if not health.lift(name):
            known = ", ".join(sorted(health.quarantined())) or "none"
            raise UsageError(f"{name} is not in quarantine (in quarantine: {known})")
    elif not why.strip():
        raise UsageError(f"say why {name} is not to be used: --why TEXT (or --lift to let it be used again)")
    else:
        catalogue.device(name, lab)
        health.quarantine(name, why.strip())
    entries = health.quarantined()
    if as_json:
        devices = {one: to_builtins(entry) for one, entry in entries.items()}
        console.print_json({"format": "edgedeploy.quarantine/1", "devices": devices})
    else:
        click.echo(f"{name} may be used again" if lift else f"{name} is kept out of every run: {entries[name].why}")


@devices_command.command("check", epilog="Example: edgedeploy devices check orin-desk-2")
@click.argument("names", nargs=-1)
@console.lab_option
@console.quiet_option
@console.json_option
def check_devices(names: tuple[str, ...], lab: Path | None, quiet: bool, as_json: bool) -> int:
    """Reach devices (default: all), start the runner there and say what each is. Exit code 3 if one fails."""
    from edgedeploy import catalogue

    checks = catalogue.check_devices(names, lab, console.progress(quiet))
    rows = []
    for check in checks:
        reached = check.facts is not None
        rows.append([check.name, "reached" if reached else "FAILED", _facts_line(check.facts) or check.problem])
        rows += [["", one.part, f"{one.state}; {one.next}" if one.next else one.state] for one in check.findings]
    documents = [
        {
            "name": check.name,
            "reached": check.facts is not None,
            "facts": to_builtins(check.facts) if check.facts else None,
            "problem": check.problem,
            "findings": [{"part": one.part, "state": one.state, "next": one.next} for one in check.findings],
        }
        for check in checks
    ]
    console.print_list("devices", ("device", "state", "what it is, or what went wrong"), rows, documents, as_json)
    return 0 if all(check.facts for check in checks) else 3


def _facts_line(facts: Any) -> str:
    if facts is None:
        return ""
    return (
        f"{facts.machine}, {facts.cores} cores, {facts.cpu_model or 'CPU model not available'}, Python {facts.python}"
    )


@devices_command.command("add", epilog="Example: edgedeploy devices add pi5 alice@10.0.0.7")
@click.argument("name")
@click.argument("address", metavar="[USER@]HOST[:PORT]")
@console.lab_option
@click.option("--key", default="", metavar="FILE", help="Your private key for it. [default: the agent, ~/.ssh/id_*]")
@click.option("--jump", default="", metavar="USER@HOST:PORT", help="A jump host. [default: what ~/.ssh/config says]")
@click.option("--python", default="", metavar="PATH", help="The interpreter there. [default: python3, else python3.x]")
@click.option("--target", default="", help="The kind of device that it is. [default: guessed]")
@click.option("--fingerprint", default="", metavar="SHA256:...", help="Of its host key: then nothing is asked.")
@click.option("--yes-if-known", is_flag=True, help="Ask nothing: go on only if its host key is known already.")
@click.option("--replace", is_flag=True, help="An entry of that name gives way; what is not given here is kept of it.")
@console.quiet_option
@console.json_option
def add_device(lab: Path | None, yes_if_known: bool, quiet: bool, as_json: bool, **given: Any) -> None:
    """Log in to a board, show what it is, and write it into the lab file.

    A host key that nobody knows is shown and asked for; it is kept in the file known_hosts beside the lab file.
    """
    from edgedeploy import boards

    accept = _accept_nothing if yes_if_known else _ask_about_key
    added = boards.add(boards.AddRequest(lab=lab, **given), accept, console.progress(quiet))
    if as_json:
        console.print_json(_added_document(added))
        return
    rows = [[key, value] for key, value in _board_rows(added) if value]
    console.print_table(f"Device {added.name}", ("", "what it is"), rows)
    click.echo(f"written to {added.lab}; next: {added.next}", err=True)


def _ask_about_key(stranger: Any) -> bool:
    """Show a host key as ssh does, and ask whether it is the device's."""
    from edgedeploy.errors import DeviceUnreachable

    shown = f"{stranger.kind} key fingerprint is {stranger.fingerprint}"
    compare = "compare it with what `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints on the device itself"
    if not sys.stdin.isatty():
        raise DeviceUnreachable(
            f"{stranger.who} is not a known host, and there is no terminal to ask at. Its {shown}; {compare}, then: "
            f"--fingerprint {stranger.fingerprint}"
        )
    click.echo(f"The authenticity of {stranger.who} ({stranger.address}) cannot be established.", err=True)
    click.echo(f"Its {shown}; {compare}.", err=True)
    answer = click.prompt("Is this its key (yes, no, or the fingerprint that the device prints)?", err=True).strip()
    return answer in ("yes", stranger.fingerprint)


def _accept_nothing(stranger: Any) -> bool:
    return False


def _board_rows(added: Any) -> list[list[str]]:
    """Return what a person wants to see of a board; an empty value is not shown."""
    from edgedeploy.units import format_bytes

    survey, facts = added.survey, added.survey.facts
    clusters = "; ".join(f"cores {one.cores} up to {one.max_hz / 1e6:.0f} MHz" for one in facts.clusters)
    isa = ", ".join(f"{name} ({gain})" for name, gain in _TELLING_ISA.items() if name in facts.isa)
    zones = ", ".join(f"{zone} {celsius:.0f} °C" for zone, celsius in survey.temperatures_celsius.items())
    governor = f"{survey.governor} (it has: {', '.join(survey.governors)})" if survey.governor else "not available"
    sudo = "sudo without a password" if survey.has_sudo else "an ordinary user's, no sudo"
    gpus = ", ".join(f"{one.name} {one.compute_capability}".strip() for one in facts.gpus)
    return [
        ["host key", ", ".join(f"{one.address} {one.kind} {one.fingerprint} ({one.reason})" for one in added.trusted)],
        ["board", facts.board],
        ["processor", f"{facts.machine}, {facts.cores} cores, {facts.cpu_model or 'model not available'}"],
        ["clusters", clusters],
        ["instructions", isa or "none that int8 or fp16 gain by"],
        ["memory", format_bytes(facts.memory_bytes) if facts.memory_bytes is not None else "not available"],
        ["disk", f"{format_bytes(survey.free_bytes)} free"],
        ["system", f"{facts.os_name or facts.system}, kernel {facts.kernel}, {facts.libc or 'C library not known'}"],
        ["Python", f"{facts.python} ({survey.python}, {facts.interpreter.bits} bits)"],
        ["runtimes", ", ".join(f"{name} {version}" for name, version in survey.runtimes.items()) or "none"],
        ["GPU", gpus],
        ["JetPack", facts.jetpack or facts.l4t],
        ["governor", governor],
        ["temperatures", zones or "not available"],
        ["rights", "root" if survey.is_root else sudo],
        ["target", f"{added.device.target or 'none'}: {added.target_reason}"],
    ]


# What /proc/cpuinfo calls the instructions that decide how fast int8 and fp16 are.
_TELLING_ISA = {
    "asimddp": "int8 dot product", "i8mm": "int8 matrix product", "asimdhp": "fp16", "bf16": "bfloat16", "sve": "SVE",
    "sve2": "SVE2", "avx2": "256-bit vectors", "avx512f": "512-bit vectors", "avx512_vnni": "VNNI, int8 dot product",
    "avx_vnni": "VNNI, int8 dot product", "amx_int8": "int8 matrix product",
}  # fmt: skip


def _added_document(added: Any) -> dict[str, Any]:
    return {
        "format": "edgedeploy.added/1",
        "name": added.name,
        "lab": str(added.lab),
        "device": to_builtins(added.device),
        "survey": to_builtins(added.survey),
        "host_keys": [
            {"address": one.address, "kind": one.kind, "fingerprint": one.fingerprint, "reason": one.reason}
            for one in added.trusted
        ],
        "target_reason": added.target_reason,
        "next": added.next,
    }


@devices_command.command("remove", epilog="Example: edgedeploy devices remove pi5")
@click.argument("name")
@console.lab_option
@console.json_option
def remove_device(name: str, lab: Path | None, as_json: bool) -> None:
    """Take a device out of the lab file; its host key stays known, and nothing is done on the device."""
    from edgedeploy import boards

    path = boards.remove(name, lab)
    if as_json:
        console.print_json({"format": "edgedeploy.removed/1", "name": name, "lab": str(path)})
    else:
        click.echo(f"{name} is no longer in {path}", err=True)


@devices_command.command("provision", epilog="Example: edgedeploy devices provision pi5 --runtime onnxruntime")
@click.argument("name")
@click.option("--runtime", "runtimes", multiple=True, metavar="NAME[==VERSION]", help="A back end's; repeatable.")
@click.option("--list", "only_list", is_flag=True, help="Show what is installed, and what sessions are opened with.")
@click.option("--prune", is_flag=True, help="Remove what no session would be opened with.")
@click.option("--upgrade", is_flag=True, help="Ask the package index again, although it was asked before.")
@console.lab_option
@console.quiet_option
@console.json_option
def provision_device(
    name: str,
    runtimes: tuple[str, ...],
    only_list: bool,
    prune: bool,
    upgrade: bool,
    lab: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Install runtimes on a board that needs no internet: wheels are fetched here, packed, sent and tried there."""
    from edgedeploy import boards
    from edgedeploy.units import format_bytes

    if not (runtimes or only_list or prune):
        raise click.UsageError("say what to install: --runtime onnxruntime; or --list, or --prune")
    done = boards.provision_device(name, lab, runtimes, console.progress(quiet), prune=prune, upgrade=upgrade)
    if as_json:
        console.print_json(_provisioned_document(done))
        return
    for one in done.provided:
        state = "is installed and works" if one.was_missing else "was there already"
        click.echo(f"{one.runtime.name} {state}", err=True)
        if one.note:
            click.echo(f"note: {one.note}", err=True)
    for removed in done.removed:
        click.echo(f"removed {removed.name} ({format_bytes(removed.size_bytes)})", err=True)
    users = {name: backend for backend, name in done.used.items()}
    rows = [[one.name, format_bytes(one.size_bytes), users.get(one.name, "")] for one in done.installed]
    console.print_table(f"Runtimes on {done.device}", ("runtime", "size", "used for"), rows)


def _provisioned_document(done: Any) -> dict[str, Any]:
    import dataclasses

    return {
        "format": "edgedeploy.provisioned/1",
        "device": done.device,
        "provided": [
            {
                "backend": one.backend, "name": one.runtime.name, "version": one.runtime.version,
                "was_missing": one.was_missing, "says": one.says, "note": one.note,
            }
            for one in done.provided
        ],
        "removed": [one.name for one in done.removed],
        "installed": [dataclasses.asdict(one) for one in done.installed],
        "used": done.used,
    }  # fmt: skip
