"""The verbs that make or open artifacts: compile, inspect."""

from __future__ import annotations

from pathlib import Path

import click

from edgedeploy.cli import console
from edgedeploy.documents import as_document


@click.command(
    epilog="""\b
Examples:
  edgedeploy compile package.module:factory --weights w.safetensors --input image=batchx3x224x224 \\
      --target host --backend onnxruntime --precision int8 --calibration samples.npz -o build/int8
  edgedeploy compile model.onnx --target raspberry-pi-5 --precision fp32 -o build/pi5
  edgedeploy compile model.onnx --target jetson-agx-orin --backend tensorrt --precision int8 \\
      --calibration samples.npz --device orin-1 -o build/orin
""",
)
@click.argument("source")
@console.weights_option
@console.input_option
@console.target_option
@console.backend_option
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]), default="fp32", show_default=True)
@click.option("--calibration", type=click.Path(path_type=Path), help="A calibration folder or an .npz.")
@click.option("-O", "options", multiple=True, metavar="KEY=VALUE", help="An option of the back end; repeatable.")
@click.option(
    "-Q",
    "quantization",
    multiple=True,
    metavar="KEY=VALUE",
    help="How a float model is quantized: ranges=mse|min-max|percentile|entropy, percentile, bias_correction, "
    "equalize, rounding=nearest|adaround, budget_db, max_float_layers, float_layers; repeatable.",
)
@click.option("--allow-loss", is_flag=True, help="Build also what loses compression, and say what.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR")
@click.option("--name", help="What to call the model. [default: from SOURCE]")
@click.option("--device", default="", help="Where to build what is tied to a device; see: edgedeploy devices list.")
@console.lab_option
@console.wait_option
@console.trust_pickle_option
@click.option("--rebuild", is_flag=True, help="Build even if the cache has it.")
@console.quiet_option
@console.json_option
def compile_command(
    source: str,
    weights: Path | None,
    inputs: tuple[str, ...],
    target: str,
    backend: str,
    precision: str,
    calibration: Path | None,
    options: tuple[str, ...],
    quantization: tuple[str, ...],
    allow_loss: bool,
    output: Path,
    name: str | None,
    device: str,
    lab: Path | None,
    wait_s: float,
    trust_pickle: bool,
    rebuild: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Turn SOURCE into an artifact and its manifest.json in DIR.

    SOURCE is a Python reference package.module:factory, a .pt2 exported program, or a .onnx file.
    """
    from edgedeploy import pipeline

    built = pipeline.compile(
        source,
        weights=weights,
        inputs=inputs,
        target=target,
        backend=backend,
        precision=precision,
        calibration=calibration,
        options=console.parse_pairs(options),
        quantization=quantization,
        allow_loss=allow_loss,
        output=output,
        name=name,
        device=device,
        lab=lab,
        wait_s=wait_s,
        trust_pickle=trust_pickle,
        rebuild=rebuild,
        progress=console.progress(quiet),
    )
    if as_json:
        console.print_json({**as_document(built.artifact), "folder": str(built.folder), "cached": built.is_cached})
        return
    from edgedeploy.render.text import artifact_text

    click.echo(artifact_text(built.artifact, color=console.uses_color(), width=console.terminal_width()))
    click.echo(f"{'unchanged, from the cache' if built.is_cached else 'built'}: {built.file}")


@click.command(
    epilog="""\b
Examples:
  edgedeploy inspect model.onnx
  edgedeploy inspect pruned.onnx --reference dense.onnx --layers
""",
)
@click.argument("model")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights for a Python reference.")
@click.option("--input", "inputs", multiple=True, metavar="NAME=SHAPE[:DTYPE]", help="For a Python reference.")
@click.option("--reference", metavar="DENSE", help="The .onnx or .pt2 from which channels were removed: says how many.")
@click.option("--layers/--no-layers", default=None, help="All layers, or none. [default: the largest]")
@console.trust_pickle_option
@console.quiet_option
@console.json_option
def inspect_command(
    model: str,
    weights: Path | None,
    inputs: tuple[str, ...],
    reference: str | None,
    layers: bool | None,
    trust_pickle: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say what MODEL is, what compression it carries, layer by layer, and what became of it.

    MODEL is an artifact folder, a .onnx, a .pt2, or a Python reference.
    """
    from edgedeploy import pipeline
    from edgedeploy.render import text

    record = pipeline.inspect(
        model,
        weights=weights,
        inputs=inputs,
        reference=reference,
        trust_pickle=trust_pickle,
        progress=console.progress(quiet),
    )
    if as_json:
        console.print_json(as_document(record))
        return
    click.echo(text.inspection_text(record, color=console.uses_color(), width=console.terminal_width(), layers=layers))
