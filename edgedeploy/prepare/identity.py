"""What decides a model's identity without loading it: the code behind a Python reference, found without running it.

A second compile of the same inputs must not import torch to learn that there is nothing to do. So the source of the
factory's module and of every module of the same project that it imports is hashed as text; installed distributions
that it imports count by their version.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgedeploy.errors import ModelError, UsageError
from edgedeploy.storage import sha256_bytes, sha256_file


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, without importing it; None when it is not there."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_identity(source: str, base: Path) -> str:
    """Return a digest of a model reference.

    Args:
        source: "package.module:factory", or a file.
        base: folder that relative files and modules are looked up in.

    Raises:
        UsageError: the file does not exist.
        ModelError: the module does not exist.
    """
    if ":" not in source:
        path = base / source
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UsageError(f"the model file {path} {what}; give package.module:factory, a .pt2 or a .onnx file")
        return _file_identity(path)
    module, _, factory = source.partition(":")
    parts = [factory]
    for name, identity in sorted(_module_closure(module, base).items()):
        parts.append(f"{name}={identity}")
    return sha256_bytes("\n".join(parts).encode())


def _file_identity(path: Path) -> str:
    """Return the digest of a model file and, for ONNX, of the data files beside it that carry its name."""
    parts = [sha256_file(path)]
    if path.suffix == ".onnx":
        beside = [*path.parent.glob(f"{path.name}*"), *path.parent.glob(f"{path.stem}*data*")]
        parts += [f"{other.name}={sha256_file(other)}" for other in sorted({*beside} - {path}) if other.is_file()]
    return parts[0] if len(parts) == 1 else sha256_bytes("\n".join(parts).encode())


def _module_closure(module: str, base: Path) -> dict[str, str]:
    """Return module name → digest of its source, or distribution name → version, for all that `module` imports."""
    distributions = _distributions(tuple(sys.path))
    sys.path.insert(0, str(base))
    try:
        found: dict[str, str] = {}
        waiting = [module]
        while waiting:
            name = waiting.pop()
            if name in found:
                continue
            path = _source_file(name)
            if path is None:
                if name == module:
                    raise ModelError(f"there is no Python module {module!r} in {base} or among the installed packages")
                continue
            top = name.partition(".")[0]
            if _is_installed(path) and top != module.partition(".")[0]:
                for distribution in distributions.get(top, [top]):
                    found[distribution] = installed_version(distribution) or "?"
                continue
            found[name] = sha256_file(path)
            is_package = path.name == "__init__.py"
            waiting += _imports(path, name if is_package else name.rpartition(".")[0])
        return found
    finally:
        sys.path.remove(str(base))


@functools.cache
def _distributions(search: tuple[str, ...]) -> Mapping[str, list[str]]:
    """Return importable name → distributions on `search`, which is sys.path: reading hundreds of them takes a while."""
    return importlib.metadata.packages_distributions()


def _source_file(name: str) -> Path | None:
    """Return a module's source file without running it or its siblings; None for built-in and missing modules."""
    if name.partition(".")[0] in sys.stdlib_module_names:
        return None
    search: list[str] | None = None
    spec = None
    for part in name.split("."):
        try:
            # By its last name alone: a folder without __init__.py would look for the parents that a full name tells of.
            spec = importlib.machinery.PathFinder.find_spec(part, search)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or [])
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _is_installed(path: Path) -> bool:
    return "site-packages" in path.parts or "dist-packages" in path.parts


def _imports(path: Path, package: str) -> Iterator[str]:
    """Yield every module name that a file's import statements could mean."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise ModelError(f"{path} is not valid Python: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".") if package else []
            parents = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            if module:
                yield module
                # `from package import name`: the name may be a module or only an attribute; a miss is skipped.
                yield from (f"{module}.{alias.name}" for alias in node.names)
