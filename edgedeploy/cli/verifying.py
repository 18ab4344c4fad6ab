"""The verb that compares all forms of a model: verify."""

from __future__ import annotations

from pathlib import Path

import click

from edgedeploy.cli import console
from edgedeploy.documents import as_document


@click.command(
    epilog="""\b
Examples:
  edgedeploy verify model.onnx --evaluation samples.npz --metric top1
  edgedeploy verify build/int8 --model package.module:factory --weights w.safetensors \\
      --evaluation samples.npz --metric top1 --metric f1_macro --layers --max-loss top1=1pt
""",
)
@click.argument("subject", metavar="MODEL|ARTIFACT")
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
    trust_pickle: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Compare a model's source, its ONNX form and an artifact on the same samples.

    The source (PyTorch, or the given ONNX) is the reference of all others. The figures are compared as they are;
    whether a loss is more than chance is what `edgedeploy gate` tests.
    """
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
