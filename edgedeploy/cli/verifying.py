"""The verb that compares all forms of a model, and with a key verifies a bundle: verify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from edgedeploy.cli import console
from edgedeploy.documents import as_document
from edgedeploy.errors import UsageError

_OF_MODELS = (
    "model", "weights", "inputs", "evaluation", "metrics", "output", "layers", "samples", "min_sqnr_db", "losses",
    "base", "trust_pickle",
)  # fmt: skip
_OF_BUNDLES = ("machine", "min_sequence", "replay", "device", "lab", "wait_s")


@click.command(
    epilog="""\b
Examples:
  edgedeploy verify model.onnx --evaluation samples.npz --metric top1
  edgedeploy verify build/int8 --model package.module:factory --weights w.safetensors \\
      --evaluation samples.npz --metric top1 --metric f1_macro --layers --max-loss top1=1pt
  edgedeploy verify demo-1.4.0.edb.tar --key release.pub.pem --machine aarch64 --min-sequence 7
""",
)
@click.argument("subject", metavar="MODEL|ARTIFACT|BUNDLE")
@click.option("--model", default="", metavar="SOURCE", help="What the artifact was compiled from: the reference.")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights of a Python source.")
@click.option(
    "--input", "inputs", multiple=True, metavar="NAME=SHAPE[:DTYPE]", help="Of a Python source. [default: artifact's]"
)
@click.option(
    "--evaluation",
    type=click.Path(path_type=Path),
    help="A folder or an .npz, with labels for metrics. [default: noise]",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME[@OUTPUT]",
    help="top1, top5, mae, mse, cosine, f1_macro, f1_micro, f1_binary, auc, eer, map, map50, or "
    "package.module:function of (outputs, labels); repeatable.",
)
@click.option("--output", default="", metavar="NAME", help="The output that metrics judge. [default: the only one]")
@click.option("--layers", is_flag=True, help="Also tensor by tensor, and where the error jumps.")
@click.option("--samples", type=click.IntRange(1), help="Look at no more than so many. [default: all]")
@click.option("--min-sqnr-db", type=float, metavar="DB", help="Exit with 1 if an output of the last form has less.")
@click.option(
    "--max-loss",
    "losses",
    multiple=True,
    metavar="METRIC=AMOUNT",
    help="Exit with 1 if the last form loses more: top1=1pt, mae=5%, mse=0.01; repeatable.",
)
@click.option(
    "--base", type=click.Path(path_type=Path, file_okay=False), help="Where Python modules are looked up. [default: .]"
)
@click.option(
    "--key", type=click.Path(path_type=Path), metavar="KEY.pub.pem", help="Of a BUNDLE: its signer's public key."
)
@click.option("--machine", default="", help="Of a BUNDLE: something in it must be for it, such as aarch64.")
@click.option("--min-sequence", type=click.IntRange(0), metavar="N", help="Of a BUNDLE: refuse an older release.")
@click.option(
    "--replay/--no-replay",
    default=None,
    help="Of a BUNDLE: let its artifacts answer their golden inputs here. [default: those for this machine]",
)
@click.option("--device", default="", help="Of a BUNDLE: check it on this device too, and replay it there.")
@console.lab_option
@console.wait_option
@console.trust_pickle_option
@console.quiet_option
@console.json_option
def verify_command(
    subject: str,
    model: str,
    weights: Path | None,
    inputs: tuple[str, ...],
    evaluation: Path | None,
    metrics: tuple[str, ...],
    output: str,
    layers: bool,
    samples: int | None,
    min_sqnr_db: float | None,
    losses: tuple[str, ...],
    base: Path | None,
    key: Path | None,
    machine: str,
    min_sequence: int | None,
    replay: bool | None,
    device: str,
    lab: Path | None,
    wait_s: float,
    trust_pickle: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Compare a model's source, its ONNX form and an artifact on the same samples; or, with --key, verify a bundle.

    The source (PyTorch, or the given ONNX) is the reference of all others. The figures are compared as they are;
    whether a loss is more than chance is what `edgedeploy gate` tests.

    A bundle is verified with nothing but itself and the key: 0 verified, 1 refused, 3 could not be checked.
    """
    if key is not None:
        _demand_unused(_OF_MODELS, "is about models, and --key says that a bundle is verified")
        return _verify_bundle(
            Path(subject), key, machine, min_sequence, replay, device, lab, wait_s, console.progress(quiet), as_json
        )
    if _is_bundle(subject):
        raise UsageError(
            f"{subject} is a bundle, which is verified with its signer's public key: add --key KEY.pub.pem"
        )
    _demand_unused(_OF_BUNDLES, "is about a bundle, which is verified with --key")
    from edgedeploy.arguments import parse_input
    from edgedeploy.judge.metrics import metric_from_text
    from edgedeploy.verify import VerifyRequest, limit_from_text, verify

    found = verify(
        VerifyRequest(
            subject=subject,
            model=model,
            weights=weights,
            inputs=tuple(parse_input(one) for one in inputs),
            base=base or Path.cwd(),
            evaluation=evaluation,
            metrics=tuple(metric_from_text(one) for one in metrics),
            output=output,
            samples=samples,
            layers=layers,
            min_sqnr_db=min_sqnr_db,
            limits=tuple(limit_from_text(one) for one in losses),
            trust_pickle=trust_pickle,
        ),
        console.progress(quiet),
    )
    if as_json:
        console.print_json(as_document(found))
    else:
        from edgedeploy.render.verification import verification_text

        click.echo(verification_text(found, color=console.uses_color(), width=console.terminal_width()))
    return 1 if found.unmet else 0


def _demand_unused(names: tuple[str, ...], why: str) -> None:
    """Refuse options of the other of the two things that this verb does.

    Raises:
        UsageError: one of them was given.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        is_given = context.get_parameter_source(parameter.name or "") is click.core.ParameterSource.COMMANDLINE
        if parameter.name in names and is_given:
            raise UsageError(f"{parameter.opts[-1]} {why}; leave one of them out")


def _is_bundle(subject: str) -> bool:
    """Say whether a file is a bundle by its name, or because its first member is a bundle's."""
    path = Path(subject)
    if subject.endswith(".edb.tar"):
        return path.is_file()
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(15) == b"signature.json\0"


def _verify_bundle(
    path: Path,
    key: Path,
    machine: str,
    min_sequence: int | None,
    replay: bool | None,
    device: str,
    lab: Path | None,
    wait_s: float,
    tell: Callable[[str], None],
    as_json: bool,
) -> int:
    from edgedeploy.evidence.opening import verify
    from edgedeploy.render.bundle import on_device_text, verification_text

    # With a device, answers count where they will be given.
    replays = False if device and replay is None else replay
    found = verify(path, key, machine=machine, min_sequence=min_sequence, replays=replays, progress=tell)
    there = None
    if device:
        from edgedeploy.installing import verify_on_device

        there = verify_on_device(path, key, device, lab, wait_s, tell, min_sequence=min_sequence or 0)
    if as_json:
        document = as_document(found)
        console.print_json({**document, "on_device": as_document(there)} if there is not None else document)
        return 0
    click.echo(verification_text(found, color=console.uses_color(), width=console.terminal_width()))
    if there is not None:
        click.echo()
        click.echo(on_device_text(there))
    return 0
