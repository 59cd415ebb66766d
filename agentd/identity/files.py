"""The identity on disk.

``node.json`` is written last at enrolment, so its presence means "enrolled". The key stays the same when the
certificate is renewed: a renewal then replaces one file, and a power cut cannot separate a key from its certificate.
"""

from __future__ import annotations

import hashlib
import json
import ssl
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from agentd.files import write_durably
from slmfleet.errors import UserError

# The control plane's certificates carry this name beside its addresses, which may change.
SERVER_NAME = "slmfleet-controlplane"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the control plane is: host:port, host:port and https://host:port. "" where it has none."""

    node_api: str
    enrollment: str
    artifacts: str


@dataclass(frozen=True, slots=True)
class Identity:
    """An enrolled node. Times are seconds since 1970."""

    folder: Path
    node_id: str
    name: str
    endpoints: Endpoints
    not_before_s: float
    not_after_s: float

    @property
    def key_file(self) -> Path:
        """PEM, mode 0600."""
        return self.folder / "client.key"

    @property
    def certificate_file(self) -> Path:
        """PEM chain, the leaf first."""
        return self.folder / "client.pem"

    @property
    def ca_file(self) -> Path:
        """PEM of the trusted authorities."""
        return self.folder / "ca.pem"

    def ssl_context(self) -> ssl.SSLContext:
        """For connections to the control plane: its authority alone is trusted, our certificate is shown.

        Use ``server_hostname=SERVER_NAME``.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(self.ca_file)
        context.load_cert_chain(self.certificate_file, self.key_file)
        return context


def folder_of(state_dir: Path) -> Path:
    """Where the identity lives in a state folder."""
    return state_dir / "identity"


def load(state_dir: Path) -> Identity | None:
    """The identity; None when this node is not enrolled. Raises UserError for a damaged one."""
    folder = folder_of(state_dir)
    file = folder / "node.json"
    try:
        facts = json.loads(file.read_text())
        identity = Identity(
            folder,
            facts["node_id"],
            facts["name"],
            Endpoints(**facts["endpoints"]),
            float(facts["not_before_s"]),
            float(facts["not_after_s"]),
        )
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; run this as the user that agentd runs as") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the identity {file} is damaged ({error}); remove the folder {folder} and enrol again"
        ) from error
    for needed in (identity.key_file, identity.certificate_file, identity.ca_file):
        if not needed.exists():
            raise UserError(f"the identity misses {needed}; remove the folder {folder} and enrol again")
    return identity


def save(identity: Identity) -> None:
    """Write ``node.json``; the certificate files must be there already."""
    facts = {
        "node_id": identity.node_id,
        "name": identity.name,
        "endpoints": asdict(identity.endpoints),
        "not_before_s": identity.not_before_s,
        "not_after_s": identity.not_after_s,
    }
    write_durably(identity.folder / "node.json", (json.dumps(facts, indent=1) + "\n").encode(), 0o600)


def learn_endpoints(identity: Identity, endpoints: Endpoints) -> Identity:
    """Remember new addresses of the control plane; an empty one is no news."""
    known = identity.endpoints
    merged = Endpoints(
        endpoints.node_api or known.node_api,
        endpoints.enrollment or known.enrollment,
        endpoints.artifacts or known.artifacts,
    )
    if merged == known:
        return identity
    changed = replace(identity, endpoints=merged)
    save(changed)
    return changed


def trust(identity: Identity, authorities: Iterable[str]) -> str:
    """Replace the trusted authorities (PEM). Returns "" or the sentence that says why they were refused.

    A set that shares no certificate with the present one is refused: an authority is replaced by way of a set that
    holds the old and the new one, so a single wrong document cannot cut the node off.
    """
    bundle = "\n".join(pem.strip() for pem in authorities if pem.strip()) + "\n"
    if not bundle.strip():
        return ""
    try:
        new = fingerprints(bundle)
    except (ssl.SSLError, ValueError) as error:
        return f"cannot trust the authorities of the desired state: they are no certificates ({error})"
    present = fingerprints(identity.ca_file.read_text())
    if new == present:
        return ""
    if not new & present:
        return "cannot trust the authorities of the desired state: none of them is trusted now"
    write_durably(identity.ca_file, bundle.encode())
    return ""


def fingerprints(bundle: str) -> set[str]:
    """Hex SHA-256 of each certificate in a PEM bundle. Raises SSLError or ValueError for a bundle with none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=bundle)
    found = {hashlib.sha256(der).hexdigest() for der in context.get_ca_certs(binary_form=True)}
    if not found:
        raise ValueError("no certificate of an authority in it")
    return found


def renewal_at(not_before_s: float, not_after_s: float) -> float:
    """When to renew: at two thirds of the certificate's life."""
    return not_before_s + (not_after_s - not_before_s) * 2 / 3
