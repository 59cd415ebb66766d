"""A broker that asks for certificates lets the control plane and nodes in by the fleet's own authority."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion

from controlplane.broker_access import with_certificate
from controlplane.db import tables
from controlplane.db.engine import make_engine
from controlplane.ingest.ingest import Ingest
from controlplane.ingest.mqtt import MqttSettings
from controlplane.node_api.pki import Pki
from slmfleet.errors import UserError
from slmfleet.v1 import telemetry_pb2 as pb
from tests.support.processes import Child, eventually, free_port

DEPLOY = Path(__file__).parents[3] / "deploy"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[Pki, int]]:
    """Mosquitto that demands a certificate of the fleet's authority and knows the rights of deploy/mosquitto.acl."""
    program = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if program is None:
        pytest.skip("mosquitto is not installed: the embedded broker knows no certificates")
    pki = Pki.open(tmp_path / "pki")
    port = free_port()
    settings = tmp_path / "mosquitto.conf"
    settings.write_text(
        f"listener {port} 127.0.0.1\nuser root\ncafile {pki.folder}/ca.pem\ncertfile {pki.folder}/server.pem\n"
        f"keyfile {pki.folder}/server.key\nrequire_certificate true\nuse_identity_as_username true\n"
        f"allow_anonymous false\nacl_file {DEPLOY}/mosquitto.acl\n"
    )
    with Child([program, "-c", settings]) as child:
        child.wait_for_line("mosquitto version .* running")
        yield pki, port


def node_context(pki: Pki, folder: Path, node_id: str) -> ssl.SSLContext:
    """As a node has it: a key of its own, a certificate with its id."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    signed = pki.sign_node_csr(request.public_bytes(serialization.Encoding.DER), node_id)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "node.pem").write_bytes(secret + signed.chain_pem.encode())
    context = ssl.create_default_context(cafile=pki.folder / "ca.pem")
    context.load_cert_chain(folder / "node.pem")
    return context


class Acks:
    """Keeps who was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def outbox_committed(
        self, node_id: str, stream: str, epoch: int, ranges: Iterable[tuple[int, int]], credit: int = 0
    ) -> bool:
        self.told.append(node_id)
        return True


@pytest.mark.postgres
def test_telemetry_over_mutual_tls(broker: tuple[Pki, int], migrated_postgres_url: str, tmp_path: Path) -> None:
    pki, port = broker
    node_id = str(uuid.uuid4())
    settings = with_certificate(MqttSettings.from_url(f"mqtts://127.0.0.1:{port}"), pki)
    assert settings.key_file is not None
    assert settings.key_file.stat().st_mode & 0o077 == 0
    batch = pb.Batch(stream="metrics", epoch=1, first=1, last=1, payload=zlib.compress(b""), dropped=1)

    async def scenario() -> None:
        engine, acks = make_engine(migrated_postgres_url), Acks()
        async with engine.begin() as connection:
            await connection.execute(sa.insert(tables.nodes).values(id=node_id, name="edge-1"))
        node = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        node.tls_set_context(node_context(pki, tmp_path, node_id))
        ingest = Ingest(engine, settings, acks, "test")
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ingest.run(), name="ingest")
            await eventually(lambda: ingest.connected, "the control plane is let in")
            await asyncio.to_thread(node.connect, "127.0.0.1", port)
            node.loop_start()

            def sent_and_acknowledged() -> bool:
                # Again, as a node does: the subscription may be younger than the first.
                node.publish(f"slmfleet/v1/{node_id}/metrics", batch.SerializeToString(), qos=1)
                return bool(acks.told)

            await eventually(sent_and_acknowledged, "the node is told that its batch is committed")
            assert set(acks.told) == {node_id}
            node.disconnect()
            node.loop_stop()
            task.cancel()
        await engine.dispose()

    asyncio.run(scenario())


def test_without_tls_there_is_nothing_to_add(tmp_path: Path) -> None:
    settings = MqttSettings.from_url("mqtt://user:word@host")
    pki = Pki.open(tmp_path / "pki")
    assert with_certificate(settings, pki) == settings
    assert "word" not in repr(settings)


def test_a_certificate_of_one_s_own_is_used_and_a_bad_one_is_one_sentence(tmp_path: Path) -> None:
    pki = Pki.open(tmp_path / "pki")
    mine = MqttSettings.from_url("mqtts://host", None, tmp_path / "none.pem", tmp_path / "none.key")
    assert with_certificate(mine, pki).cert_file == tmp_path / "none.pem"
    with pytest.raises(UserError, match="mqtt_cert_file"):
        mine.context()
