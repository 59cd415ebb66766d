"""The control plane's own client certificate for a broker that asks for one.

Signed by the authority of the fleet like those of nodes: a broker that lets nodes in by it lets us in too. The
common name ``controlplane`` is what its access rules name (deploy/mosquitto.acl).
"""

from __future__ import annotations

import dataclasses

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from controlplane.datafolder import write_whole
from controlplane.ingest.mqtt import MqttSettings
from controlplane.node_api.pki import Pki

NAME = "controlplane"
# Made anew at each start; a process that runs longer than this is the exception that a restart mends.
DAYS = 825.0


def with_certificate(settings: MqttSettings, pki: Pki) -> MqttSettings:
    """``settings``, completed for TLS: the fleet's authority is trusted beside the system's, and a certificate is shown
    where no own one was given. Writes ``mqtt.pem`` and ``mqtt.key`` (0600) beside the others."""
    if not settings.tls:
        return settings
    settings = dataclasses.replace(settings, fleet_ca_file=pki.folder / "ca.pem")
    if settings.cert_file is not None:
        return settings
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    signed = pki.sign_node_csr(request.public_bytes(serialization.Encoding.DER), NAME, days=DAYS)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    cert_file, key_file = pki.folder / "mqtt.pem", pki.folder / "mqtt.key"
    write_whole(key_file, secret.decode(), 0o600)
    write_whole(cert_file, signed.chain_pem)
    return dataclasses.replace(settings, cert_file=cert_file, key_file=key_file)
