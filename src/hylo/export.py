"""Portable directories: a hybrid with the code that runs it, for machines without this package.

transformers loads code from a model's directory if its files lie flat and import each other as `from .file import
name`. So that code is this package's own sources, each under its dotted name with underscores (hylo.ops.ssd becomes
hylo_ops_ssd.py) and unchanged but for the import lines.
"""

import ast
import os
import shutil
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

from hylo.checkpoint import INDEX, Weights, copy_companions, weight_files
from hylo.errors import HyloError
from hylo.files import complete_directory, read_json, write_json
from hylo.modeling import HyloConfig, HyloForCausalLM, HyloModel
from hylo.modeling.configuration import AUTO_MAP, CODE

PACKAGES = ("hylo.modeling.", "hylo.ops.")


def export_portable(directory: Path, out: Path) -> None:
    """Copies a hylo directory to the new directory `out`, with the code in place of the stub that imports the package.

    Weights become hard links where the file system has them. Raises HyloError for a `directory` that is no complete
    hylo model and an `out` that exists or cannot be written.
    """
    config = read_json(directory / "config.json", "configuration")
    if (model_type := config.get("model_type")) != HyloConfig.model_type:
        raise HyloError(f"model {directory} is of model_type {model_type}; exported are directories that hylo wrote")
    Weights(directory)  # names what is missing or damaged
    sources = portable_sources()
    with complete_directory(out) as partial:
        for file in weight_files(directory):
            _link(file, partial / file.name)
        if (directory / INDEX).is_file():
            shutil.copyfile(directory / INDEX, partial / INDEX)
        copy_companions(directory, partial)
        write_json(partial / "config.json", config | {"auto_map": AUTO_MAP})
        for name, text in sources.items():
            (partial / name).write_text(text, encoding="utf-8")


def portable_sources() -> dict[str, str]:
    """The text of every file of code by its name: the classes' module and all that it imports from this package.

    Raises HyloError if that leads out of hylo.modeling and hylo.ops, or to an import that no flat file can have.
    """
    classes = (HyloConfig, HyloModel, HyloForCausalLM)
    needed = sorted(r for r in requires("hylo") or [] if r.startswith(("torch", "transformers")))
    imports = [f"from .{_flat(found.__module__)} import {found.__name__}" for found in classes]
    lines = [
        f'"""A hybrid\'s classes, from the files beside this one: the code of hylo {version("hylo")}.',
        "",
        f"Needs {' and '.join(needed)}.",
        '"""',
        "",
        *imports,
        "",
        f"__all__ = {[found.__name__ for found in classes]}",
        "",
    ]
    sources = {f"{CODE}.py": "\n".join(lines)}
    waiting = [found.__module__ for found in classes]
    while waiting:
        module = waiting.pop()
        if (name := f"{_flat(module)}.py") not in sources:
            sources[name], imported = flatten(module)
            waiting += imported
    return sources


def flatten(module: str) -> tuple[str, list[str]]:
    """A module's source with its imports from this package made relative, and the modules that those are."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    lines, imported = text.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(text)):
        for name in _own_imports(node):
            line = getattr(node, "lineno", 0) - 1
            old, new = f"from {name} import", f"from .{_flat(name)} import"
            if not name.startswith(PACKAGES) or old not in lines[line]:
                raise HyloError(
                    f"{spec.origin}, line {line + 1}, imports {name}: a portable model's code can import from modules "
                    "of hylo.modeling and hylo.ops only, as in `from hylo.ops.ssd import ssd`; move what it needs there"
                )
            lines[line] = lines[line].replace(old, new)
            imported.append(name)
    return "".join(lines), imported


def _own_imports(node: ast.AST) -> list[str]:
    """What an import statement names of this package: modules, with leading dots where it says so relatively."""
    if isinstance(node, ast.ImportFrom):
        found = ["." * node.level + (node.module or "")]
    elif isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    else:
        return []
    return [name for name in found if name.split(".")[0] in ("hylo", "")]


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
