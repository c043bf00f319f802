"""The house's arrows: who may import whom, and what an import must not do."""

from __future__ import annotations

import subprocess
import sys

import grimp
import pytest

LIBRARY, TRAINER = "modest_align_kernels", "modest_align_train"
BACKENDS, COMPILED = f"{LIBRARY}.backends", f"{LIBRARY}._C"


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    graph = grimp.build_graph(LIBRARY, TRAINER, include_external_packages=True, cache_dir=None)
    # grimp knows files of Python alone: an import of the compiled module looks like one of the whole package.
    graph.add_module(COMPILED)
    for importer in graph.find_modules_that_directly_import(LIBRARY):
        lines = graph.get_import_details(importer=importer, imported=LIBRARY)
        if all(line["line_contents"] == f"from {LIBRARY} import _C" for line in lines):
            graph.remove_import(importer=importer, imported=LIBRARY)
            graph.add_import(importer=importer, imported=COMPILED)
    return graph


def imports_of(graph: grimp.ImportGraph, package: str) -> set[str]:
    """What a module, or what is in a package, imports from outside itself and the standard library."""
    members = {package} | graph.find_descendants(package)
    imports = set().union(*map(graph.find_modules_directly_imported_by, members)) - members
    return {name for name in imports if name.split(".")[0] not in sys.stdlib_module_names}


def test_arrows_go_one_way(graph: grimp.ImportGraph) -> None:
    registry, contract = f"{BACKENDS}.registry", f"{BACKENDS}.contract"
    names = ("__main__", "integrations", "testing", "reference", "modules", "functional", "sharded", "distributed")
    layers = (
        *(f"{LIBRARY}.{name}" for name in names),
        {f"{LIBRARY}.dispatch", f"{LIBRARY}.autograd"},
        f"{LIBRARY}.ops",
        registry,
        graph.find_children(BACKENDS) - {registry, contract},
        {COMPILED, contract, f"{LIBRARY}.noise"},
    )
    # No layer imports one above it, nor its neighbour in a set, be it by way of modules that are in no layer.
    against = graph.find_illegal_dependencies_for_layers(layers)
    assert not against, [(route.heads, route.middle, route.tails) for found in against for route in found.routes]


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        (LIBRARY, {"torch", "triton", "sentence_transformers"}),
        (f"{LIBRARY}.integrations.open_clip", {"torch", f"{LIBRARY}.modules"}),
        (f"{LIBRARY}.noise", {"torch"}),
        (f"{LIBRARY}.reference", {"torch", f"{LIBRARY}.noise"}),
        (f"{LIBRARY}.testing", {"torch", f"{LIBRARY}.reference"}),
    ],
)
def test_imports_are_few(graph: grimp.ImportGraph, package: str, allowed: set[str]) -> None:
    assert imports_of(graph, package) <= allowed


def test_the_trainer_uses_the_public_face_only(graph: grimp.ImportGraph) -> None:
    assert {name for name in imports_of(graph, TRAINER) if name.startswith(LIBRARY)} == {LIBRARY}


def test_only_native_imports_the_compiled_module(graph: grimp.ImportGraph) -> None:
    importers = graph.find_modules_that_directly_import(COMPILED)
    assert importers <= {f"{BACKENDS}.native"} | graph.find_descendants(f"{BACKENDS}.native")


def test_other_peoples_trainers_are_imported_by_their_integration_only(graph: grimp.ImportGraph) -> None:
    assert graph.find_modules_that_directly_import("sentence_transformers") <= {
        f"{LIBRARY}.integrations.sentence_transformers",
        f"{TRAINER}.encoders",
    }
    assert not graph.find_modules_that_directly_import(f"{LIBRARY}.integrations")


def test_import_is_quiet_and_touches_no_gpu() -> None:
    code = "import torch, modest_align_kernels; print(torch.cuda.is_initialized())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
    assert "modest" not in result.stderr
