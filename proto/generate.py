"""Writes the Python stubs of proto/tramontane/v1/*.proto beside them, or into another folder.

    python proto/generate.py [--out FOLDER]

The stubs are committed, so that nobody needs grpcio-tools to install the package; a test regenerates
them and fails if they differ. Generate with the grpcio-tools that the constraints file pins: the stubs
need at least its grpcio and its protobuf at run time.
"""

import argparse
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Write `*_pb2.py` and `.pyi`, and for services `*_pb2_grpc.py`, under `out`/tramontane/v1."""
    protos = sorted((ROOT / "tramontane" / "v1").glob("*.proto"))
    services = [path for path in protos if path.stem.endswith("_service")]
    _protoc([f"--python_out={out}", f"--pyi_out={out}"], protos)
    _protoc([f"--grpc_python_out={out}"], services)


def _protoc(outputs: list[str], protos: list[Path]) -> None:
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    names = [str(path.relative_to(ROOT)) for path in protos]
    status = protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, *names])
    if status != 0:
        raise SystemExit(status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=ROOT)
    generate(parser.parse_args().out)
