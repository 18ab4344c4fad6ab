"""The verb that says what quantizing each layer costs: sensitivity."""

from __future__ import annotations

from pathlib import Path

import click

from edgedeploy.cli import console
from edgedeploy.documents import as_document


@click.command(
    epilog="""\b
Examples:
  edgedeploy sensitivity model.onnx --calibration samples.npz
  edgedeploy sensitivity package.module:factory --weights w.safetensors --input image=batchx3x224x224 \\
      --calibration samples.npz --target raspberry-pi-5 -Q max_float_layers=6
""",
)
@click.argument("model")
@click.option("--calibration", type=click.Path(path_type=Path), required=True, help="A calibration folder or an .npz.")
@console.weights_option
@console.input_option
@console.target_option
@console.backend_option
@click.option(
    "-Q",
    "quantization",
    multiple=True,
    metavar="KEY=VALUE",
    help="As of compile; max_float_layers and budget_db say where the curve ends; repeatable.",
)
@click.option("--name", help="What to call the model. [default: from MODEL]")
@console.trust_pickle_option
@console.quiet_option
@console.json_option
def sensitivity_command(
    model: str,
    calibration: Path,
    weights: Path | None,
    inputs: tuple[str, ...],
    target: str,
    backend: str,
    quantization: tuple[str, ...],
    name: str | None,
    trust_pickle: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Show what MODEL gains in int8 when one layer after another stays float, and what that costs.

    `compile -Q budget_db=...` takes the first row that reaches the budget.
    """
    from edgedeploy import pipeline

    found = pipeline.sensitivity(
        model,
        calibration=calibration,
        weights=weights,
        inputs=inputs,
        target=target,
        backend=backend,
        quantization=quantization,
        name=name,
        trust_pickle=trust_pickle,
        progress=console.progress(quiet),
    )
    if as_json:
        console.print_json(as_document(found))
        return
    from edgedeploy.render.sensitivity import sensitivity_text

    click.echo(sensitivity_text(found, color=console.uses_color(), width=console.terminal_width()))
