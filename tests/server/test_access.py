"""TLS, clients' certificates and tokens, over real connections, and while their files change."""

import asyncio
import datetime
import logging
import urllib.request
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc

import tramontane
from runtime.config import AccessConfig
from runtime.errors import InvalidArgument
from runtime.server import current
from runtime.server.access import exposure, open_access
from runtime.server.lifecycle import SERVICE, serve
from tests.server.harness import ask, details, refusal, serving
from tests.server.scripted import ScriptedEngine
from tests.server.test_lifecycle import pipeline
from tramontane import Client, Error, Unauthenticated, Unavailable
from tramontane.v1 import inference_service_pb2

SERVICES = inference_service_pb2.DESCRIPTOR.services_by_name
OLD, NEW, STRANGE = "old-0123456789abcdef", "new/0123456789abcde+==", "strange.0123456789~"


class Authority:
    """A CA whose certificate is in `file`, and who writes others' beside it."""

    def __init__(self, folder, name):
        self._ca = trustme.CA()
        self._folder = folder
        self.file = str(folder / f"{name}.ca.crt")
        self._ca.cert_pem.write_to_path(self.file)

    def write(self, name: str, identity: str = "127.0.0.1") -> tuple[str, str]:
        """Files of a certificate and its key, which are replaced if they are there."""
        made = self._ca.issue_cert(identity)
        cert, key = str(self._folder / f"{name}.crt"), str(self._folder / f"{name}.key")
        made.cert_chain_pems[0].write_to_path(cert)
        made.private_key_pem.write_to_path(key)
        return cert, key


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


@pytest.fixture(scope="module")
def pair(ours):
    return ours.write("server")


@pytest.fixture
def tokens(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"{OLD}\n")
    return file


def seen_by(visit, metrics_port=None, **access):
    """visit(target, running) in a thread, with a server that asks for `access` of its clients."""

    async def go():
        config = AccessConfig(**access)
        async with serving(ScriptedEngine(b"abc"), access=config, metrics_port=metrics_port) as running:
            return await asyncio.to_thread(visit, running.target, running)

    return asyncio.run(go())


def models(target, **options):
    with Client(target, resumes=0, **options) as client:
        return [model.name for model in client.models(timeout=60)]


def tls(pair, client_ca=None) -> dict:
    return {"tls_cert": pair[0], "tls_key": pair[1], "tls_client_ca": client_ca}


# ---- TLS ------------------------------------------------------------------------------------------------


def test_tls(ours, theirs, pair):
    def visit(target, running):
        assert models(target, tls_ca=ours.file)
        with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
            models(target, tls_ca=theirs.file)
        with pytest.raises(Unavailable):
            models(target)
        with pytest.raises(Unavailable, match="Hostname"):
            models(target.replace("127.0.0.1", "localhost"), tls_ca=ours.file)

    seen_by(visit, **tls(pair))


def test_a_client_with_tls_does_not_talk_to_a_server_without(ours):
    with pytest.raises(Unavailable, match="WRONG_VERSION_NUMBER"):
        seen_by(lambda target, _: models(target, tls_ca=ours.file))


def test_clients_show_a_certificate_where_one_is_wanted(ours, theirs, pair):
    cert, key = theirs.write("client", "someone")
    strange_cert, strange_key = ours.write("client", "someone")

    def visit(target, running):
        assert models(target, tls_ca=ours.file, tls_cert=cert, tls_key=key)
        for wrong in ({}, {"tls_cert": strange_cert, "tls_key": strange_key}):
            with pytest.raises(Unavailable):
                models(target, tls_ca=ours.file, **wrong)

    seen_by(visit, **tls(pair, theirs.file))


def test_certificates_are_rotated_while_the_server_runs(tmp_path, ours, theirs, caplog):
    """Both halves, one after the other: between the two, the old pair is used, and a connection that stands
    is not touched."""
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    pair = old.write("server")

    def visit(target, running):
        with Client(target, resumes=0, tls_ca=old.file) as client:
            assert client.models(timeout=60)
            cert, key = new.write("fresh")
            replace(cert, pair[0])
            assert models(target, tls_ca=old.file)
            assert "server.key: is not the key of" in caplog.text
            replace(key, pair[1])
            assert models(target, tls_ca=new.file)
            with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
                models(target, tls_ca=old.file)
            assert client.models(timeout=60)

    with caplog.at_level(logging.WARNING):
        seen_by(visit, **tls(pair))
    assert len(complaints(caplog)) == 1, caplog.text


def complaints(caplog) -> list[logging.LogRecord]:
    """What was said of the files: others may have something to say meanwhile."""
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [record for record in warnings if record.name == current.__name__]


def test_the_authority_of_clients_is_rotated_too(tmp_path, ours, pair):
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    mine = dict(zip(("tls_cert", "tls_key"), new.write("client", "someone"), strict=True))

    def visit(target, running):
        with pytest.raises(Unavailable):
            models(target, tls_ca=ours.file, **mine)
        replace(new.file, old.file)
        assert models(target, tls_ca=ours.file, **mine)

    seen_by(visit, **tls(pair, old.file))


def replace(source, target):
    Path(target).write_bytes(Path(source).read_bytes())


# ---- tokens ---------------------------------------------------------------------------------------------


WRONG = (
    [],
    [f"Bearer {STRANGE}"],
    [f"Bearer {OLD[:-1]}"],
    [f"Bearer {OLD}x"],
    [f"Basic {OLD}"],
    [OLD],
    ["Bearer"],
    [f"Bearer {OLD}", f"Bearer {STRANGE}"],
)


def test_every_call_but_health_wants_a_token(tokens):
    """Of our service, of reflection, and of what is not there."""
    methods = [f"/{SERVICE}/{method.name}" for method in SERVICES["InferenceService"].methods] + [
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.health.v1.Healthy/Check",
    ]

    async def go():
        access = AccessConfig(auth_token_file=str(tokens))
        async with serving(ScriptedEngine(b"abc"), access=access) as running:
            for place, method in enumerate(methods):
                for wrong in WRONG if place == 0 else WRONG[:2]:
                    metadata = [("authorization", value) for value in wrong]
                    call = running.channel.stream_stream(method)(iter([b""]), metadata=metadata, timeout=60)
                    error = await refusal(call)
                    assert error.code() is grpc.StatusCode.UNAUTHENTICATED, (method, wrong)
                    assert details(error)["ErrorInfo"].reason == "UNAUTHENTICATED"
                    assert not any(token[:-1] in error.details() for token in (OLD, STRANGE))
                    assert "\n" not in error.details()
            assert not running.engine.requests
            stub = health_pb2_grpc.HealthStub(running.channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            metadata = [("authorization", f"bearer  {OLD} ")]  # a scheme has no case: RFC 9110, 11.1
            assert [message async for message in running.stub.Generate(ask(), metadata=metadata)]

    asyncio.run(go())


def test_a_large_request_is_refused_as_fast(tokens):
    async def go():
        access = AccessConfig(auth_token_file=str(tokens))
        async with serving(ScriptedEngine(b"abc"), access=access) as running:
            error = await refusal(running.stub.Generate(ask("a" * (7 << 20)), timeout=60))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(go())


def test_refusals_are_counted_and_the_watch_port_asks_for_nothing(tokens):
    def visit(target, running):
        with pytest.raises(Unauthenticated, match="wants a token"):
            models(target)
        page = f"http://127.0.0.1:{running.server.metrics_port}/metrics"
        with urllib.request.urlopen(page, timeout=60) as answer:
            text = answer.read().decode()
        assert 'tramontane_requests_total{code="UNAUTHENTICATED",method="ListModels"} 1.0' in text

    seen_by(visit, metrics_port=0, auth_token_file=str(tokens))


def test_tokens_are_rotated_while_the_server_runs(tokens, caplog):
    """Over one connection. What cannot be used changes nothing, and is said once."""

    def visit(target, running):
        with Client(target, resumes=0, token=OLD) as old, Client(target, resumes=0, token=NEW) as new:

            def known(client):
                try:
                    return bool(client.models(timeout=60))
                except Unauthenticated as error:
                    assert "none that this server knows" in error.message
                    return False

            assert (known(old), known(new)) == (True, False)
            tokens.write_text(f"{NEW}\n\n{OLD}\n")
            assert (known(old), known(new)) == (True, True)
            tokens.write_text(f"{NEW}\n")
            assert (known(old), known(new)) == (False, True)
            for _ in range(3):
                tokens.write_text(f"{STRANGE} and more\n")
                assert (known(old), known(new)) == (False, True)
            assert "auth-token-file: " in caplog.text and "line 1" in caplog.text
            tokens.unlink()
            assert (known(old), known(new)) == (False, True)
            tokens.write_text(f"{OLD}\n")
            assert (known(old), known(new)) == (True, False)

    with caplog.at_level(logging.DEBUG):
        seen_by(visit, auth_token_file=str(tokens))
    assert len(complaints(caplog)) == 2, caplog.text
    assert not any(token in caplog.text for token in (OLD, NEW, STRANGE))


def test_a_stream_goes_on_where_it_broke_with_its_certificate_and_token(talk, ours, theirs, pair, tokens):
    cert, key = theirs.write("client", "someone")
    engine = ScriptedEngine(b"abcdefgh", dies=3)
    access = AccessConfig(**tls(pair, theirs.file), auth_token_file=str(tokens))
    mine = {"tls_ca": ours.file, "tls_cert": cert, "tls_key": key, "token": OLD}

    def conversation(client):
        with client.stream_generate("x", max_tokens=8, seed=1) as stream:
            text = "".join(chunk.text for chunk in stream)
        assert (text, stream.reply.resumed) == ("abcdefgh", 2)
        assert client.generate("x", max_tokens=8, seed=1).text == "abcdefgh"
        assert client.tokenize("a", timeout=60) and client.score("abc", timeout=60).tokens

    talk(engine, conversation, resumes=4, client=mine, access=access)


def test_a_wrong_token_is_not_tried_again(talk, tokens):
    engine = ScriptedEngine(b"abc")

    def conversation(client):
        for call in (client.generate, client.score, client.tokenize):
            with pytest.raises(Unauthenticated) as caught:
                call("abc", timeout=60)
            assert STRANGE not in str(caught.value)

    access = AccessConfig(auth_token_file=str(tokens))
    talk(engine, conversation, resumes=8, client={"token": STRANGE}, access=access)
    assert not engine.requests


# ---- what cannot be used --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, ours, theirs, pair):
    folder = tmp_path_factory.mktemp("files")
    (folder / "junk").write_bytes(b"-----BEGIN CERTIFICATE-----\n\xff\n-----END CERTIFICATE-----\n")
    (folder / "empty").write_bytes(b"\n \n")
    (folder / "words").write_text(f"{OLD}\ntwo words {STRANGE}\n")
    (folder / "accent").write_text("jet\u00f3n", encoding="utf-8")
    (folder / "large").write_bytes(b"a" * ((1 << 20) + 1))
    key = serialization.load_pem_private_key(Path(pair[1]).read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (folder / "locked").write_bytes(locked)
    named = {path.name: str(path) for path in folder.iterdir()}
    other = theirs.write("other")
    return named | {
        "none": str(folder / "none"),
        "cert": pair[0],
        "key": pair[1],
        "other": other[1],
        "folder": str(folder),
    }


CASES = [
    ({"tls_cert": "cert"}, "tls-key", "cert"),
    ({"tls_key": "key"}, "tls-cert", "key"),
    ({"tls_client_ca": "cert"}, "tls-client-ca", "cert"),
    ({"tls_cert": "none", "tls_key": "key"}, "tls-cert", "none"),
    ({"tls_cert": "cert", "tls_key": "none"}, "tls-key", "none"),
    ({"tls_cert": "junk", "tls_key": "key"}, "tls-cert", "junk"),
    ({"tls_cert": "key", "tls_key": "key"}, "tls-cert", "key"),
    ({"tls_cert": "cert", "tls_key": "junk"}, "tls-key", "junk"),
    ({"tls_cert": "cert", "tls_key": "cert"}, "tls-key", "cert"),
    ({"tls_cert": "cert", "tls_key": "other"}, "tls-key", "other"),
    ({"tls_cert": "cert", "tls_key": "locked"}, "tls-key", "locked"),
    ({"tls_cert": "cert", "tls_key": "key", "tls_client_ca": "none"}, "tls-client-ca", "none"),
    ({"tls_cert": "cert", "tls_key": "key", "tls_client_ca": "key"}, "tls-client-ca", "key"),
    ({"auth_token_file": "none"}, "auth-token-file", "none"),
    ({"auth_token_file": "folder"}, "auth-token-file", "folder"),
    ({"auth_token_file": "empty"}, "auth-token-file", "empty"),
    ({"auth_token_file": "words"}, "auth-token-file", "words"),
    ({"auth_token_file": "accent"}, "auth-token-file", "accent"),
    ({"auth_token_file": "large"}, "auth-token-file", "large"),
]


@pytest.mark.parametrize(("given", "field", "culprit"), CASES)
def test_what_cannot_be_used_is_named(files, given, field, culprit):
    with pytest.raises(InvalidArgument) as caught:
        open_access(AccessConfig(**{name: files[file] for name, file in given.items()}))
    assert caught.value.field == field
    assert files[culprit] in str(caught.value) and "\n" not in str(caught.value)
    assert not any(token in str(caught.value) for token in (OLD, STRANGE))


def test_a_certificate_of_a_kind_that_grpc_lacks_is_no_busy_port(tmp_path):
    key = ec.generate_private_key(ec.SECP256K1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    cert_file, key_file = tmp_path / "tls.crt", tmp_path / "tls.key"
    cert_file.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    access = AccessConfig(tls_cert=str(cert_file), tls_key=str(key_file))
    with pytest.raises(InvalidArgument, match=r"tls-cert: .*tls\.crt: gRPC does not take it"):
        asyncio.run(serve(pipeline(), port=0, access=access))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tls_cert": "cert"}, "tls_key: is missing"),
        ({"tls_key": "key"}, "tls_cert: is missing"),
        ({"tls_cert": "cert", "tls_key": "key"}, "tls_ca: is missing"),
        ({"tls_ca": "none"}, "tls_ca: .*none: No such file"),
        ({"tls_ca": "junk"}, "tls_ca: .*junk: holds no certificate"),
        ({"tls_ca": "cert", "tls_cert": "cert", "tls_key": "other"}, "tls_key: .* is not the key of .*"),
    ],
)
@pytest.mark.parametrize("kind", [Client, tramontane.AsyncClient])
def test_a_client_names_the_file_too(files, kind, given, words):
    with pytest.raises(Error, match=words):
        kind("127.0.0.1:1", **{name: files[file] for name, file in given.items()})


@pytest.mark.parametrize("token", ["", "two words", f"{STRANGE}\n", "jet\u00f3n", "=="])
def test_a_client_takes_no_token_that_cannot_be_sent(token):
    with pytest.raises(Error, match=r"^token: is no bearer token") as caught:
        Client("127.0.0.1:1", token=token)
    assert STRANGE not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "access", "words"),
    [
        ("127.0.0.1", {}, None),
        ("localhost", {}, None),
        ("::1", {}, None),
        ("0.0.0.0", {}, "nothing is encrypted"),
        ("::", {}, "nothing is encrypted"),
        ("192.0.2.1", {"tls_cert": "c"}, "anyone may ask"),
        ("0.0.0.0", {"auth_token_file": "t"}, "can be read"),
        ("0.0.0.0", {"tls_cert": "c", "auth_token_file": "t"}, None),
        ("0.0.0.0", {"tls_cert": "c", "tls_client_ca": "a"}, None),
    ],
)
def test_an_open_door_is_mentioned(host, access, words):
    said = exposure(host, AccessConfig(**access))
    assert said is None if words is None else words in said and host in said
