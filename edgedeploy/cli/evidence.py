"""The verb that packs a release and its evidence into one signed file: bundle."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import cast

import click

from edgedeploy.cli import console
from edgedeploy.documents import as_document
from edgedeploy.errors import UsageError

_MOST_PASSPHRASE_BYTES = 1024


@click.command(
    epilog="""\b
Examples:
  edgedeploy bundle --new-key release.pem                     a key pair: release.pem, release.pub.pem
  edgedeploy bundle edgedeploy.toml --version 1.4.0 --sequence 7 --sign release.pem
  edgedeploy bundle bench_results/reports/20261122T091405Z-demo.json --version 1.4.0 -o demo.edb.tar
""",
)
@click.argument("subject", metavar="[VERDICT|RELEASE]", type=click.Path(path_type=Path), required=False)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The bundle. [default: NAME-VERSION.edb.tar, here]"
)
@click.option("--version", default="", help="Of the release, as you call it, such as 1.4.0.")
@click.option(
    "--sequence",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="A number that grows with each release, so that a device can refuse an older one.",
)
@click.option("--sign", type=click.Path(path_type=Path), metavar="KEY.pem", help="Sign with this private key.")
@click.option(
    "--passphrase",
    default="",
    metavar="env:NAME|file:PATH|prompt",
    help="Where the private key's passphrase is. [default: ask at a terminal where the key is encrypted]",
)
@click.option("--release", type=click.Path(path_type=Path), help="The release file of a VERDICT.")
@click.option("--card", type=click.Path(path_type=Path), help="The model card. [default: MODEL_CARD.md by the release]")
@click.option("--license", "license_", type=click.Path(path_type=Path), help="[default: LICENSE by the release]")
@click.option(
    "--allow-decision",
    "allowed",
    multiple=True,
    type=click.Choice(["FAIL", "INCONCLUSIVE"]),
    help="Pack this verdict too; the bundle says it. Repeatable.",
)
@click.option("--with-baselines", is_flag=True, help="The baselines' artifacts too.")
@click.option("--new-key", type=click.Path(path_type=Path), metavar="KEY.pem", help="Make a key pair, and stop.")
@console.results_option
@console.quiet_option
@console.json_option
def bundle_command(
    subject: Path | None,
    output: Path | None,
    version: str,
    sequence: int,
    sign: Path | None,
    passphrase: str,
    release: Path | None,
    card: Path | None,
    license_: Path | None,
    allowed: tuple[str, ...],
    with_baselines: bool,
    new_key: Path | None,
    results: Path,
    quiet: bool,
    as_json: bool,
) -> None:
    """Pack what a verdict rests on into one signed file, or make a key to sign with.

    In it: the artifacts with their golden answers, the raw runs, the verdict and its policy, digests of model and data,
    versions of tools, model card, licence and a CycloneDX bill of materials. The same inputs give the same bytes.
    """
    if new_key is not None:
        _make_key(new_key, subject, sign, passphrase, as_json)
        return
    if subject is None or not version:
        raise UsageError("name what to pack and call it: edgedeploy bundle VERDICT.json --version 1.4.0")
    from edgedeploy.evidence.gather import PackRequest
    from edgedeploy.evidence.pack import SUFFIX, pack
    from edgedeploy.evidence.seal import is_encrypted, load_key
    from edgedeploy.records.verdict import Decision
    from edgedeploy.render.bundle import packed_text

    key = None
    if sign is not None:
        source = passphrase or ("prompt" if is_encrypted(sign) and sys.stdin.isatty() else "")
        key = load_key(sign, _passphrase(source, is_new=False))
    elif passphrase:
        raise UsageError("--passphrase is about the key that --sign names; add that, or leave it out")
    request = PackRequest(
        subject=subject,
        version=version,
        sequence=sequence,
        results=results,
        release=release,
        card=card,
        license=license_,
        allowed=cast("tuple[Decision, ...]", allowed),
        with_baselines=with_baselines,
    )
    tell = console.progress(quiet)
    out = output or Path(f"{_as_file_name(subject.stem)}-{_as_file_name(version)}{SUFFIX}")
    packed = pack(request, out, key, tell)
    if as_json:
        console.print_json(
            {
                "format": "edgedeploy.packed/1",
                "file": str(packed.path),
                "sha256": packed.sha256,
                "size_bytes": packed.size_bytes,
                "key_sha256": packed.key_sha256,
                "bundle": as_document(packed.bundle),
            }
        )
        return
    notes = (
        [] if packed.is_sbom_checked else ["the bill of materials was not checked: jsonschema is not installed here"]
    )
    click.echo(
        packed_text(
            packed.bundle,
            file=str(packed.path),
            size_bytes=packed.size_bytes,
            key_sha256=packed.key_sha256,
            notes=notes,
        )
    )


def _make_key(path: Path, subject: Path | None, sign: Path | None, passphrase: str, as_json: bool) -> None:
    if subject is not None or sign is not None:
        raise UsageError("--new-key makes a key and stops; pack and sign in a second command")
    from edgedeploy.evidence.seal import new_key

    private, public = new_key(path, _passphrase(passphrase, is_new=True))
    if as_json:
        console.print_json({"format": "edgedeploy.key/1", "private": str(private), "public": str(public)})
        return
    click.echo(f"wrote {private} (the private key: keep it, show it to nobody) and {public} (give it to everybody)")


def _passphrase(source: str, *, is_new: bool) -> str:
    """Return a passphrase from where openssl's users keep it; never from the command line, which everybody can read."""
    if not source:
        return ""
    kind, _, where = source.partition(":")
    if kind == "prompt" and not where:
        text: str = click.prompt("Passphrase of the key", hide_input=True, confirmation_prompt=is_new, err=True)
        return text
    if kind == "env" and where:
        if not os.environ.get(where):
            raise UsageError(f"--passphrase {source}: the variable {where} is not set, or is empty")
        return os.environ[where]
    if kind == "file" and where:
        return _first_line(Path(where))
    raise UsageError("--passphrase says where the passphrase is: env:NAME, file:PATH or prompt")


def _first_line(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise UsageError(f"--passphrase file:{path}: that is not a file")
            line = stream.readline(_MOST_PASSPHRASE_BYTES)
    except OSError as error:
        raise UsageError(f"--passphrase file:{path}: {error.strerror or error}") from error
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"--passphrase file:{path}: its first line is not UTF-8 text") from error
    if not text:
        raise UsageError(f"--passphrase file:{path}: its first line is empty")
    return text


def _as_file_name(text: str) -> str:
    kept = "".join(one if one.isalnum() or one in "._-" else "-" for one in text)
    return kept.strip(".") or "bundle"
