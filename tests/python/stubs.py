"""The protocol, as any language has it: generated from the .proto files and nothing else."""

import importlib
import pathlib
import sys
import tempfile
from types import SimpleNamespace

import grpc_tools
from grpc_tools import protoc

PROTOS = pathlib.Path(__file__).resolve().parents[2] / "proto" / "proto"
FILES = ("common", "device", "page", "notifier", "memory", "admin")


def generate():
    """Compiles the .proto files, and returns (messages, services) of package shootdown.v1."""
    out = tempfile.mkdtemp(prefix="shootdown-stubs-")
    paths = [str(PROTOS / "shootdown" / "v1" / f"{name}.proto") for name in FILES]
    well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{PROTOS}", f"-I{well_known}", f"--python_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(arguments + paths) != 0:
        raise RuntimeError("protoc refused the .proto files")
    sys.path.insert(0, out)
    messages, services = SimpleNamespace(), SimpleNamespace()
    for name in FILES:
        for suffix, into in (("pb2", messages), ("pb2_grpc", services)):
            module = importlib.import_module(f"shootdown.v1.{name}_{suffix}")
            into.__dict__.update({key: value for key, value in vars(module).items() if key[0].isupper()})
    return messages, services
