"""The authority's folder: made once, kept, refused when it is not as it should be."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from controlplane.node_api.pki import BadRequest, Pki, fingerprint
from slmfleet.errors import UserError
from tests.support.fake_node import make_csr

NOW = datetime.datetime(2026, 11, 22, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


def chain(pki: Pki) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(pki.server_chain_pem)


def names(certificate: x509.Certificate) -> set[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in found}


def test_a_first_start_makes_everything(tmp_path: Path) -> None:
    pki = Pki.open(tmp_path / "pki", ["edge.example.com", "10.0.0.7"], now=NOW)
    files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in pki.folder.iterdir()}
    assert files == {"ca.pem": 0o644, "ca.key": 0o600, "server.pem": 0o644, "server.key": 0o600}
    leaf, authority = chain(pki)
    leaf.verify_directly_issued_by(authority)
    assert names(leaf) == {
        "slmfleet-controlplane", "localhost", "127.0.0.1", "::1", "edge.example.com", "10.0.0.7"
    }  # fmt: skip
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert pki.ca_fingerprint == fingerprint(authority)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_second_start_finds_the_same(tmp_path: Path) -> None:
    first, second = Pki.open(tmp_path, now=NOW), Pki.open(tmp_path, now=NOW + DAY)
    assert (first.ca_pem, first.server_chain_pem, first.server_key_pem) == (
        second.ca_pem,
        second.server_chain_pem,
        second.server_key_pem,
    )


@pytest.mark.parametrize(("days", "extra", "renewed"), [(1, [], False), (370, [], True), (1, ["new.example"], True)])
def test_the_server_certificate_is_renewed_the_authority_never(
    tmp_path: Path, days: int, extra: list[str], renewed: bool
) -> None:
    first = Pki.open(tmp_path, now=NOW)
    second = Pki.open(tmp_path, extra, now=NOW + days * DAY)
    assert (chain(first)[0] != chain(second)[0]) is renewed
    assert first.ca_pem == second.ca_pem


def test_a_first_start_that_was_cut_is_done_again(tmp_path: Path) -> None:
    Pki.open(tmp_path, now=NOW)
    for name in ("ca.pem", "server.pem", "server.key"):
        (tmp_path / name).unlink()
    assert Pki.open(tmp_path, now=NOW).ca_pem
    (tmp_path / "server.key").unlink()
    Pki.open(tmp_path, now=NOW)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "ca.key").chmod(0o644), "may be read by others .mode 0644.: run chmod 600"),
        (lambda folder: (folder / "server.key").chmod(0o640), "may be read by others"),
        (lambda folder: (folder / "ca.key").write_text("junk"), "holds no ECDSA private key"),
        (lambda folder: (folder / "ca.pem").write_text("junk"), "holds no certificate"),
        (lambda folder: (folder / "ca.pem").write_bytes(b""), "holds no certificate"),
        (lambda folder: (folder / "ca.key").unlink(), "is missing: restore it"),
        (lambda folder: (folder / "ca.pem").unlink(), "is missing: restore it"),
        (lambda folder: (folder / "ca.key").write_bytes((folder / "server.key").read_bytes()), "is not the key of"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_sentence(tmp_path: Path, spoil, sentence: str) -> None:
    Pki.open(tmp_path, now=NOW)
    spoil(tmp_path)
    with pytest.raises(UserError, match=sentence) as caught:
        Pki.open(tmp_path, now=NOW)
    assert "\n" not in str(caught.value)


def test_an_authority_at_its_end_is_refused(tmp_path: Path) -> None:
    Pki.open(tmp_path, now=NOW)
    with pytest.raises(UserError, match="ended on 2036"):
        Pki.open(tmp_path, now=NOW + 3651 * DAY)


def test_a_name_that_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no name for a server certificate"):
        Pki.open(tmp_path, ["bücher.example"], now=NOW)


def test_node_certificates(tmp_path: Path) -> None:
    pki = Pki.open(tmp_path, now=NOW)
    key = ec.generate_private_key(ec.SECP256R1())
    signed = pki.sign_node_csr(make_csr(key, "whoever i want to be"), "node-7", days=30, now=NOW)
    leaf, authority = x509.load_pem_x509_certificates(signed.chain_pem.encode())
    leaf.verify_directly_issued_by(authority)
    assert [item.value for item in leaf.subject] == ["node-7"]
    assert leaf.public_key() == key.public_key()
    assert signed.not_after == leaf.not_valid_after_utc == NOW + 30 * DAY
    assert signed.fingerprint == fingerprint(leaf)
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_requests_that_are_not_signed(tmp_path: Path) -> None:
    pki = Pki.open(tmp_path, now=NOW)
    good = make_csr(ec.generate_private_key(ec.SECP256R1()))
    for bad in (b"", b"junk", good[:-8], good[:-8] + bytes(8), make_csr(ec.generate_private_key(ec.SECP256K1()))):
        with pytest.raises(BadRequest):
            pki.sign_node_csr(bad, "node", now=NOW)
