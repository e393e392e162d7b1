"""gRPC server reflection, v1 and the older v1alpha, so that generic clients can list and call.

The reflection package of grpcio implements v1alpha alone. v1 has the same messages under another package
name (https://github.com/grpc/grpc/blob/master/doc/server-reflection.md), so one handler serves both.
"""

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

_ALPHA = "grpc.reflection.v1alpha"
_V1 = "grpc.reflection.v1"


def add_reflection(server: grpc.aio.Server, service_names: Sequence[str]) -> None:
    """Make `service_names`, and reflection itself, visible. Call before the server starts."""
    names = [f"{package}.ServerReflection" for package in (_V1, _ALPHA)]
    servicer = reflection.aio.ReflectionServicer([*service_names, *names], pool=_pool())
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = [
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler}) for name in names
    ]
    server.add_generic_rpc_handlers(handlers)


def _pool() -> descriptor_pool.DescriptorPool:
    """The default pool, with the v1 names in it so that reflection can describe itself."""
    pool = descriptor_pool.Default()
    filename = f"{_V1.replace('.', '/')}/reflection.proto"
    try:
        pool.FindFileByName(filename)
    except KeyError:
        file = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(file)
        file.name, file.package = filename, _V1
        for message in file.message_type:
            for field in message.field:
                if field.type_name:
                    field.type_name = field.type_name.replace(f".{_ALPHA}.", f".{_V1}.")
        for method in file.service[0].method:
            method.input_type = method.input_type.replace(_ALPHA, _V1)
            method.output_type = method.output_type.replace(_ALPHA, _V1)
        pool.AddSerializedFile(file.SerializeToString())
    return pool
