"""Records which parameters Transformer Engine's layers declare, read from its sources without importing them.

    pip download --no-deps transformer-engine==2.20.2
    python -m tests.unit.record_te_parameters transformer_engine-2.20.2-py3-none-any.whl

writes recorded_signatures/transformer_engine.json anew.
"""

from __future__ import annotations

import ast
import json
import pathlib
import sys
import zipfile

RECORD = pathlib.Path(__file__).parent / "recorded_signatures" / "transformer_engine.json"
LAYERS = {
    "module/linear.py": "Linear",
    "module/layernorm_linear.py": "LayerNormLinear",
    "module/grouped_linear.py": "GroupedLinear",
    "ops/basic/rmsnorm.py": "RMSNorm",
}


def declared(source: str, layer: str) -> dict[str, list[str]]:
    """Name -> sizes of every parameter that the constructor of a class registers, as they are called there."""
    (found,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == layer)
    (init,) = (n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(init):
        if isinstance(node, ast.Assign):
            assigned.setdefault(ast.unparse(node.targets[0]), []).append(node.value)
    calls = [n for n in ast.walk(init) if isinstance(n, ast.Call) and ast.unparse(n.func) == "self.register_parameter"]
    return {_name(call.args[0], assigned): _sizes(call.args[1], assigned) for call in calls}


def _name(node: ast.expr, assigned: dict[str, list[ast.expr]]) -> str:
    if isinstance(node, ast.Subscript):  # names[i]: the one name where the matrix is not split
        (node,) = (v.elts[0] for v in assigned[ast.unparse(node.value)] if isinstance(v, ast.List) and v.elts)
    return ast.literal_eval(node) if isinstance(node, ast.Constant) else ast.unparse(node)[2:-1]  # f'weight{i}'


def _sizes(node: ast.expr, assigned: dict[str, list[ast.expr]]) -> list[str]:
    """Of the one torch.empty(…) that is in an expression, or in what its variables were assigned."""
    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    expressions = [node, *(value for name in names for value in assigned.get(name, []))]
    calls = [n for expression in expressions for n in ast.walk(expression) if isinstance(n, ast.Call)]
    (empty,) = (call for call in calls if ast.unparse(call.func) == "torch.empty")
    return [ast.unparse(size).removeprefix("self.") for size in empty.args]


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as files:
        sources = {path: files.read(f"transformer_engine/pytorch/{path}").decode() for path in LAYERS}
    record = {
        "project": "transformer-engine",
        "contents": "layer of transformer_engine.pytorch: the parameters its constructor registers, and their sizes",
        "version": pathlib.Path(wheel).name.split("-")[1],
        "parameters": {layer: declared(sources[path], layer) for path, layer in LAYERS.items()},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
