"""The bill of materials of a bundle: CycloneDX 1.6 with a model card for each model, and what was measured of it."""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import edgedeploy
from edgedeploy.errors import BackendMissing, InternalError
from edgedeploy.evidence.gather import Measured
from edgedeploy.records.model import TensorSpec
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import Finding, Verdict
from edgedeploy.render.figures import is_flipped

if TYPE_CHECKING:
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

# A namespace of our own, so that equal content has equal serial numbers and no others (RFC 9562, section 5.5).
_NAMESPACE = uuid.UUID("7f1f2c0e-5d2a-5b8e-9a51-3f0f7c0c4e6d")
_INDENT = 1


def sbom(
    verdict: Verdict, version: str, measured: Sequence[Measured], *, license_text: str, content_sha256: str
) -> tuple[bytes, bool]:
    """Return the document, and whether it could be checked against CycloneDX's schema here.

    The library that writes it has no model cards yet (cyclonedx-python-lib 11), nor formulations, so that these two
    parts of the document are added to what it writes, before the whole is checked against the schema that it ships.

    Args:
        verdict: what was judged; its time is the document's, which knows no clock.
        version: of the release.
        measured: the artifacts and their runs.
        license_text: of the models; "": not known.
        content_sha256: of everything else in the bundle; the serial number is made of it.

    Raises:
        BackendMissing: the library is not installed here.
        InternalError: the document breaks the schema.
    """
    try:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.model.tool import ToolRepository
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError as error:
        raise BackendMissing(
            "cyclonedx-python-lib, which writes the bill of materials, is not installed here; "
            "pip install 'edgedeploy[evidence]'"
        ) from error

    licenses = _licenses(license_text)
    models = {one.cell.cell: _model(one, version, licenses) for one in measured}
    runtimes = {name: _library(*_split(name), prefix="runtime") for name in {one.run.runtime for one in measured}}
    data = {sha256: _data(name, sha256) for one in measured for name, sha256 in _sets(one)}
    product = Component(
        name=verdict.name, version=version, type=ComponentType.APPLICATION, bom_ref="release", licenses=licenses
    )
    bom = Bom(
        serial_number=uuid.uuid5(_NAMESPACE, content_sha256),
        metadata=BomMetaData(
            timestamp=datetime.fromisoformat(verdict.judged_utc),
            component=product,
            tools=ToolRepository(components=[_library("edgedeploy", edgedeploy.__version__, prefix="tool")]),
        ),
        components=[*models.values(), *runtimes.values(), *data.values()],
    )
    bom.register_dependency(product, models.values())
    for one in measured:
        used = [runtimes[one.run.runtime], *(data[sha256] for _, sha256 in _sets(one))]
        bom.register_dependency(models[one.cell.cell], used)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        document: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    for component in document["components"]:
        for one in measured:
            if component["bom-ref"] == f"model:{one.cell.cell}":
                component["modelCard"] = _model_card(one, verdict)
    document["formulation"] = _formulation(measured)
    data_bytes = json.dumps(document, indent=_INDENT, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    return data_bytes, _is_checked(data_bytes)


def _is_checked(document: bytes) -> bool:
    """Check the document against the schema; False where what reads schemas is not installed."""
    from cyclonedx.exception import MissingOptionalDependencyException
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    try:
        problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(document.decode())
    except MissingOptionalDependencyException:
        return False
    if problem is not None:
        raise InternalError(f"the bill of materials breaks CycloneDX 1.6: {problem}")
    return True


# ---------------------------------------------------------------- components


def _model(one: Measured, version: str, licenses: Sequence[License]) -> Component:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType

    recipe = one.artifact.recipe
    facts = {
        "cell": one.cell.cell,
        "role": one.cell.role,
        "target": recipe.target,
        "backend": recipe.backend,
        "precision": recipe.precision,
        "file": one.cell.artifact,
        "recipe": one.artifact.key,
        "source_sha256": recipe.model_sha256,
        **({"weights_sha256": recipe.weights_sha256} if recipe.weights_sha256 else {}),
    }
    return Component(
        name=recipe.model,
        version=version,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"model:{one.cell.cell}",
        description=f"{recipe.precision} for {recipe.target}, compiled for {recipe.backend}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=one.artifact.sha256)],
        licenses=licenses,
        properties=[Property(name=f"edgedeploy:{name}", value=value) for name, value in facts.items()],
    )


def _library(name: str, version: str, *, prefix: str) -> Component:
    """Return a package; only what Python's index is known to call so has a package URL."""
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    is_indexed = prefix != "runtime" and bool(version)
    return Component(
        name=name,
        version=version or None,
        type=ComponentType.LIBRARY,
        bom_ref=f"{prefix}:{name}@{version}",
        purl=PackageURL("pypi", None, name.lower().replace("_", "-"), version) if is_indexed else None,
    )


def _data(name: str, sha256: str) -> Component:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=name,
        type=ComponentType.DATA,
        bom_ref=f"data:{sha256[:16]}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
    )


def _sets(one: Measured) -> list[tuple[str, str]]:
    """Return name and digest of the sets that an artifact was calibrated and judged on."""
    recipe, outputs = one.artifact.recipe, one.run.outputs
    pairs = [(recipe.calibration, recipe.calibration_sha256)]
    pairs += [(outputs.dataset, outputs.dataset_sha256)] if outputs else []
    return [(name, sha256) for name, sha256 in pairs if sha256]


def _licenses(text: str) -> list[License]:
    """Return the models' licence: by SPDX's name where the text says it, else as the text itself."""
    from cyclonedx.model import AttachedText
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.spdx import is_supported_id

    if not text.strip():
        return []
    attached = AttachedText(content=text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = next((line.partition(":")[2].strip() for line in lines[:20] if "SPDX-License-Identifier:" in line), "")
    if is_supported_id(named):
        return [DisjunctiveLicense(id=named, text=attached)]
    return [DisjunctiveLicense(name=lines[0][:100], text=attached)]


def _split(runtime: str) -> tuple[str, str]:
    name, _, version = runtime.rpartition(" ")
    return (name, version) if name else (runtime, "")


# ---------------------------------------------------------------- what the library cannot say yet


def _model_card(one: Measured, verdict: Verdict) -> dict[str, Any]:
    return {
        "bom-ref": f"card:{one.cell.cell}",
        "modelParameters": {
            "datasets": [{"ref": f"data:{sha256[:16]}"} for _, sha256 in _sets(one)],
            "inputs": [{"format": _format(spec)} for spec in one.cell.inputs],
            "outputs": [{"format": _format(spec)} for spec in one.cell.outputs],
        },
        "quantitativeAnalysis": {"performanceMetrics": _metrics(one, verdict)},
        "considerations": {
            "technicalLimitations": [
                f"measured on {one.run.facts.cpu_model or one.run.facts.machine} with {one.run.runtime}; the figures "
                f"are of this device"
            ],
            "performanceTradeoffs": list(one.artifact.notes),
        },
    }


def _metrics(one: Measured, verdict: Verdict) -> list[dict[str, Any]]:
    """Return what was judged of a cell: the value, and the change against the baseline with its interval."""
    found = next((cell for cell in verdict.cells if cell.cell == one.cell.cell), None)
    metrics: list[dict[str, Any]] = []
    for finding in found.findings if found else ():
        where = f"device={one.run.device}, runtime={one.run.runtime}"
        if finding.candidate_value is not None:
            metrics.append(
                {"type": _metric_name(finding, one.run), "value": _number(finding.candidate_value), "slice": where}
            )
        if finding.effect is not None:
            metrics.append(_change(finding, one.run, f"{where}, baseline={one.cell.baseline_cell}"))
    return metrics


def _change(finding: Finding, run: Run, where: str) -> dict[str, Any]:
    kind = finding.margin.kind if finding.margin else "limit"
    if kind == "limit":  # nothing was asked of the change, which is then told as it always is
        kind = "points" if is_flipped(finding, run.outputs.metric if run.outputs else "") else "relative"
    change: dict[str, Any] = {
        "type": f"{_metric_name(finding, run)} worsening ({kind})",
        "value": _number(finding.effect or 0.0),
        "slice": where,
    }
    if finding.low is not None and finding.high is not None:
        change["confidenceInterval"] = {"lowerBound": _number(finding.low), "upperBound": _number(finding.high)}
    return change


def _metric_name(finding: Finding, run: Run) -> str:
    return run.outputs.metric if finding.metric == "accuracy" and run.outputs else finding.metric


def _number(value: float) -> str:
    return repr(float(value))


def _format(spec: TensorSpec) -> str:
    layout = f" {spec.layout}" if spec.layout else ""
    return f"{spec.name}: {spec.dtype} [{', '.join(str(axis) for axis in spec.shape)}]{layout}"


def _formulation(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return what the artifacts were made with, by the versions that their recipes name."""
    tools: Mapping[str, str] = {
        f"{name}@{version}": name for one in measured for name, version in one.artifact.recipe.toolchain.items()
    }
    components = [
        {
            "type": "library",
            "bom-ref": f"made-with:{key}",
            "name": name,
            "version": key.removeprefix(f"{name}@"),
        }
        for key, name in sorted(tools.items())
    ]
    return [{"bom-ref": "toolchain", "components": components}]
