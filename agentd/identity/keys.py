"""Keys, signing requests and signatures. Imports ``cryptography``, so only short-lived processes import this."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agentd.files import write_durably
from slmfleet.errors import UserError


def load_or_make(file: Path) -> ec.EllipticCurvePrivateKey:
    """The node's P-256 key; made here, mode 0600, where there is none. It never leaves this folder."""
    if file.exists():
        try:
            key = serialization.load_pem_private_key(file.read_bytes(), password=None)
        except ValueError as error:
            raise UserError(f"the key {file} is damaged ({error}); remove it and enrol again") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise UserError(f"the key {file} is no elliptic-curve key; remove it and enrol again")
        return key
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_durably(file, pem, 0o600)
    return key


def signing_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """PKCS#10, DER. The server chooses the subject of the certificate; the name here only informs."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """ECDSA over SHA-256, DER."""
    return key.sign(message, ec.ECDSA(hashes.SHA256()))


def lifetime(certificate_pem: str, key: ec.EllipticCurvePrivateKey) -> tuple[float, float]:
    """(not before, not after) of the first certificate, seconds since 1970. Raises UserError for another key's."""
    certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
    if certificate.public_key() != key.public_key():
        raise UserError("the control plane sent a certificate for another key: nothing was changed")
    return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
