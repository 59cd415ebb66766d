"""The control plane's own certificate authority (P-256, X.509 v3, RFC 5280): who is a node, and who is the server.

One folder holds all of it::

    ca.key       private key of the authority, PKCS#8 PEM, mode 0600: whoever reads it can be any node
    ca.pem       its certificate; nodes pin the SHA-256 of its DER form through their enrolment token
    server.key   private key of the gRPC and artifact servers, mode 0600
    server.pem   their certificate, followed by the authority's (a node that enrols takes the last one of the chain)

The server's certificate is made anew when it nears its end, when the names change, or when the files are not a pair.
The authority is never made anew over an old one: every node would have to enrol again.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import ipaddress
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from slmfleet import logs
from slmfleet.errors import UserError

log = logs.get(__name__)

SERVER_NAME = "slmfleet-controlplane"
_STANDARD_NAMES = (SERVER_NAME, "localhost", "127.0.0.1", "::1")
_CA_DAYS = 3650
_SERVER_DAYS = 397
_SERVER_RENEW_DAYS = 30
# Certificates begin this long before they are made: edge devices have clocks that are late.
_BACKDATE = datetime.timedelta(hours=1)
_CURVES = ("secp256r1", "secp384r1")


class BadRequest(Exception):
    """A certificate signing request that can't be signed; the text says why."""


@dataclass(frozen=True, slots=True)
class NodeCertificate:
    """A signed client certificate. ``chain_pem``: leaf, then authority; ``fingerprint``: hex SHA-256 of the leaf;
    ``key_sha256``: hex SHA-256 of its public key (SubjectPublicKeyInfo, DER)."""

    chain_pem: str
    not_after: datetime.datetime
    fingerprint: str
    key_sha256: str


@dataclass(frozen=True, slots=True)
class Pki:
    """The authority and the server's identity, in memory. All ``*_pem`` are what gRPC and ``ssl`` want: bytes."""

    folder: Path
    ca_pem: bytes
    server_chain_pem: bytes
    server_key_pem: bytes
    _ca: x509.Certificate
    _ca_key: ec.EllipticCurvePrivateKey

    @classmethod
    def open(cls, folder: Path, names: Iterable[str] = (), *, now: datetime.datetime | None = None) -> Pki:
        """Read ``folder``, making what is missing. ``names``: further DNS names or addresses of this server.

        Raises UserError when a file can't be read, is broken, or when a private key may be read by others.
        """
        moment = now or datetime.datetime.now(datetime.UTC)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(folder):
                ca, ca_key = _load_or_make_ca(folder, moment)
                chain, key = _load_or_make_server(folder, ca, ca_key, (*_STANDARD_NAMES, *names), moment)
        except OSError as error:
            raise UserError(f"cannot use the certificate folder {folder}: {error.strerror or error}") from None
        return cls(folder, _pem(ca), chain, key, ca, ca_key)

    @property
    def ca_fingerprint(self) -> str:
        """Hex SHA-256 of the authority's certificate (DER): what an enrolment token carries."""
        return fingerprint(self._ca)

    def sign_node_csr(
        self, csr_der: bytes, node_id: str, *, days: float = 30.0, now: datetime.datetime | None = None
    ) -> NodeCertificate:
        """A client certificate for the key in ``csr_der``; its common name is ``node_id``, whatever the CSR asks for.

        Raises BadRequest for bytes that are no PKCS#10, a wrong self-signature or a key that is no P-256 or P-384.
        """
        moment = now or datetime.datetime.now(datetime.UTC)
        public_key = csr_key(csr_der)
        not_after = min(moment + datetime.timedelta(days=days), self._ca.not_valid_after_utc)
        usage = ExtendedKeyUsageOID.CLIENT_AUTH
        builder = _leaf(node_id, public_key, self._ca, moment, usage).not_valid_after(not_after)
        certificate = builder.sign(self._ca_key, hashes.SHA256())
        chain = (_pem(certificate) + self.ca_pem).decode()
        return NodeCertificate(chain, certificate.not_valid_after_utc, fingerprint(certificate), key_sha256(public_key))


def fingerprint(certificate: x509.Certificate) -> str:
    """Lower-case hex SHA-256 of the DER form."""
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def key_sha256(key: ec.EllipticCurvePublicKey) -> str:
    """Lower-case hex SHA-256 of the SubjectPublicKeyInfo (DER)."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def csr_key(csr_der: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a PKCS#10 (DER) whose self-signature proves that its sender holds it. Raises BadRequest."""
    try:
        csr = x509.load_der_x509_csr(csr_der)
        genuine = csr.is_signature_valid
        key = csr.public_key()
    except (ValueError, TypeError) as error:
        raise BadRequest("csr is no certificate signing request (PKCS#10, DER)") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise BadRequest("csr has a key of an unsupported kind: make it with an ECDSA P-256 key")
    if not genuine:
        raise BadRequest("csr is not signed by the key that it carries")
    return key


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two processes that start at once on one folder must not make two authorities."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _load_or_make_ca(folder: Path, now: datetime.datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_file, key_file = folder / "ca.pem", folder / "ca.key"
    if not certificate_file.exists() and not (folder / "server.pem").exists():
        # Nothing yet, or a first start that was cut between the two files: no node can know this authority.
        return _make_ca(certificate_file, key_file, now)
    for file in (certificate_file, key_file):
        if not file.exists():
            raise UserError(
                f"{file} is missing: restore it from a backup, or move {folder} away to start with a new authority "
                "(every node must then enrol again)"
            )
    certificate = _read_certificate(certificate_file)
    key = _read_key(key_file)
    if key.public_key() != certificate.public_key():
        raise UserError(f"{key_file} is not the key of {certificate_file}: restore the pair from one backup")
    if certificate.not_valid_after_utc <= now:
        raise UserError(
            f"the authority in {certificate_file} ended on {certificate.not_valid_after_utc:%Y-%m-%d}: move {folder} "
            "away to start with a new one (every node must then enrol again), or set the clock right"
        )
    return certificate, key


def _make_ca(
    certificate_file: Path, key_file: Path, now: datetime.datetime
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"slmfleet CA {now:%Y-%m-%d}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + datetime.timedelta(days=_CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(key_file, _key_pem(key), 0o600)
    _write(certificate_file, _pem(certificate), 0o644)
    log.info("certificate authority made", file=certificate_file, sha256=fingerprint(certificate))
    return certificate, key


def _load_or_make_server(
    folder: Path, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, names: Iterable[str], now: datetime.datetime
) -> tuple[bytes, bytes]:
    """The server's chain and key as PEM."""
    certificate_file, key_file = folder / "server.pem", folder / "server.key"
    alternatives = _alternative_names(names)
    if certificate_file.exists() and key_file.exists():
        certificate = _read_certificate(certificate_file)
        key = _read_key(key_file)
        chain = _pem(certificate) + _pem(ca)
        if _still_good(certificate, key, ca, alternatives, now) and certificate_file.read_bytes() == chain:
            return chain, _key_pem(key)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _leaf(SERVER_NAME, key.public_key(), ca, now, ExtendedKeyUsageOID.SERVER_AUTH)
        .not_valid_after(min(now + datetime.timedelta(days=_SERVER_DAYS), ca.not_valid_after_utc))
        .add_extension(alternatives, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    chain = _pem(certificate) + _pem(ca)
    _write(key_file, _key_pem(key), 0o600)
    _write(certificate_file, chain, 0o644)
    log.info("server certificate made", file=certificate_file, not_after=certificate.not_valid_after_utc.isoformat())
    return chain, _key_pem(key)


def _still_good(
    certificate: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    names: x509.SubjectAlternativeName,
    now: datetime.datetime,
) -> bool:
    try:
        held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    ends = min(certificate.not_valid_after_utc, ca.not_valid_after_utc)
    # Near the authority's own end a new certificate would live no longer than this one.
    fresh = ends - now > datetime.timedelta(days=_SERVER_RENEW_DAYS) or ends == ca.not_valid_after_utc
    return (
        fresh
        and now < ends
        and certificate.issuer == ca.subject
        and set(held) == set(names)
        and key.public_key() == certificate.public_key()
    )


def _leaf(
    name: str,
    key: ec.EllipticCurvePublicKey,
    ca: x509.Certificate,
    now: datetime.datetime,
    usage: x509.ObjectIdentifier,
) -> x509.CertificateBuilder:
    authority = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(ca.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(names: Iterable[str]) -> x509.SubjectAlternativeName:
    found: dict[x509.GeneralName, None] = {}
    for name in names:
        try:
            found[x509.IPAddress(ipaddress.ip_address(name))] = None
        except ValueError:
            try:
                found[x509.DNSName(name)] = None
            except ValueError:
                raise UserError(
                    f"{name!r} is no name for a server certificate: give a DNS name or an address"
                ) from None
    return x509.SubjectAlternativeName(list(found))


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read_certificate(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except ValueError:
        raise UserError(
            f"{file} holds no certificate (PEM): restore it from a backup, or move {file.parent} away to start with a "
            "new authority (every node must then enrol again)"
        ) from None


def _read_key(file: Path) -> ec.EllipticCurvePrivateKey:
    mode = file.stat().st_mode & 0o777
    if mode & 0o077:
        raise UserError(f"{file} may be read by others (mode {mode:04o}): run chmod 600 {file}")
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{file} holds no ECDSA private key (PEM, no pass phrase): restore it from a backup")
    return key


def _write(file: Path, content: bytes, mode: int) -> None:
    """Whole or not at all, also through a power cut."""
    temporary = file.with_name(file.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
