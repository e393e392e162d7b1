"""The contract: linted, its stubs up to date, and usable by clients that know nothing of this project."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2

from tests.server.harness import serving
from tests.server.scripted import ScriptedEngine
from tests.support import REPOSITORY

STUBS = REPOSITORY / "proto" / "tramontane" / "v1"


def test_stubs_are_those_of_the_protos(tmp_path):
    subprocess.run(
        [sys.executable, REPOSITORY / "proto" / "generate.py", "--out", tmp_path], check=True, timeout=200
    )
    fresh = {path.name: path.read_text() for path in (tmp_path / "tramontane" / "v1").iterdir()}
    committed = {path.name: path.read_text() for path in STUBS.glob("*_pb2*") if path.is_file()}
    assert committed == fresh, "run: python proto/generate.py"


def test_lint_is_clean():
    buf = Path(sys.executable).with_name("buf")  # buf-bin puts it beside the interpreter
    done = subprocess.run([buf, "lint"], cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_sampling_scalar_tells_absent_from_zero():
    from tramontane.v1 import sampling_pb2

    for field in sampling_pb2.SamplingParams.DESCRIPTOR.fields:
        assert field.is_repeated or field.has_presence, field.name


class Reflected:
    """A generic client: all it knows is an address and the reflection protocol."""

    def __init__(self, channel: grpc.Channel, version: str):
        self.channel = channel
        self.ask = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        self.pool = descriptor_pool.DescriptorPool()

    def once(self, **request):
        (reply,) = self.ask(iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=60)
        return reply

    def services(self) -> list[str]:
        return [service.name for service in self.once(list_services="").list_services_response.service]

    def describe(self, symbol: str):
        reply = self.once(file_containing_symbol=symbol)
        files = {}
        for data in reply.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            files[file.name] = file
        while files:  # dependencies first
            for name, file in list(files.items()):
                if not any(dependency in files for dependency in file.dependency):
                    self.pool.Add(files.pop(name))
        return self.pool.FindServiceByName(symbol)

    def call(self, method, values: dict) -> list:
        request = message_factory.GetMessageClass(method.input_type)(**values)
        response = message_factory.GetMessageClass(method.output_type)
        make = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
        path = f"/{method.containing_service.full_name}/{method.name}"
        call = make(
            path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return list(call(request, timeout=60)) if method.server_streaming else [call(request, timeout=60)]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_a_generic_client_lists_describes_and_calls(version):
    def visit(target):
        with grpc.insecure_channel(target) as channel:
            client = Reflected(channel, version)
            assert {"tramontane.v1.InferenceService", "grpc.health.v1.Health"} < set(client.services())
            service = client.describe("tramontane.v1.InferenceService")
            assert [method.name for method in service.methods] == [
                "Generate", "Score", "Tokenize", "Detokenize", "GetModel", "ListModels", "GetLoad",
            ]  # fmt: skip
            methods = service.methods_by_name
            messages = client.call(methods["Generate"], {"text": "hi", "sampling": {"max_tokens": 3}})
            (model,) = client.call(methods["GetModel"], {})
            return "".join(message.text for message in messages), messages[-1].finish, model.model.name

    async def go():
        async with serving(ScriptedEngine(b"hello")) as running:
            return await asyncio.to_thread(visit, running.target)

    text, finish, name = asyncio.run(go())
    assert (text, finish.usage.completion_tokens, name) == ("hel", 3, "scripted")


def test_reflection_describes_everything_it_lists():
    def visit(target):
        with grpc.insecure_channel(target) as channel:
            client = Reflected(channel, "v1")
            return {name: client.describe(name).full_name for name in client.services()}

    async def go():
        async with serving(ScriptedEngine()) as running:
            return await asyncio.to_thread(visit, running.target)

    found = asyncio.run(go())
    assert len(found) == 4
    assert all(name == described for name, described in found.items())


STRANGER = """
import json, sys, grpc
from tramontane.v1 import generate_pb2, inference_service_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
    request = generate_pb2.GenerateRequest(text="hi", sampling={"stop": ["lo"]})
    messages = list(stub.Generate(request, timeout=60))
assert generate_pb2.__file__.startswith(sys.argv[2]), "not the stubs that were generated here"
print(json.dumps(["".join(m.text for m in messages), messages[-1].finish.stop_string]))
"""


def test_stubs_that_a_stranger_generates_from_the_protos_work(tmp_path):
    """In a process of its own, with nothing of this project but the .proto files."""

    def visit(target):
        protos = [str(path.relative_to(REPOSITORY / "proto")) for path in STUBS.glob("*.proto")]
        flags = [f"-I{REPOSITORY / 'proto'}", f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *flags, *protos], check=True, timeout=200)
        for package in ("tramontane", "tramontane/v1"):  # an installed tramontane must not come first
            (tmp_path / package / "__init__.py").touch()
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", STRANGER, target, str(tmp_path)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    async def go():
        async with serving(ScriptedEngine(b"hello")) as running:
            return await asyncio.to_thread(visit, running.target)

    assert asyncio.run(go()) == ["hel", "lo"]
