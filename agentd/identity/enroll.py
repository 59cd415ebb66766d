"""Enrolment and renewal against the control plane's enrolment port (server TLS, no client certificate).

Runs in short-lived processes (``agentd enroll``, ``python -m agentd.identity.renew``): the daemon must not carry
``cryptography`` in its memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from agentd.files import fsync_folder, write_durably
from agentd.identity import keys
from agentd.identity.files import SERVER_NAME, Endpoints, Identity, folder_of, load, save
from agentd.identity.pinning import Token, pinned_authority
from slmfleet import __version__
from slmfleet.config import parse_address
from slmfleet.errors import UserError
from slmfleet.v1 import enrollment_pb2, enrollment_pb2_grpc, state_pb2

TIMEOUT_S = 30.0


class Unreachable(UserError):
    """The server can't be reached now; trying again later makes sense."""

    exit_code = 75  # EX_TEMPFAIL


def enroll(
    state_dir: Path,
    server: str,
    token: Token,
    name: str,
    labels: Mapping[str, str],
    inventory: state_pb2.Inventory,
) -> Identity:
    """Make this device a node; the identity is on disk when this returns.

    A key that an interrupted enrolment left is used again, so that the node that the server may have made for it is
    found, not made twice. Raises UserError.
    """
    host, port = parse_address(server)
    try:
        authority = pinned_authority(token, host, port)
    except OSError as error:
        raise Unreachable(f"cannot reach the control plane at {server}: {error}") from error
    folder = folder_of(state_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = keys.load_or_make(folder / "client.key")
    request = enrollment_pb2.EnrollRequest(
        token=token.text,
        csr=keys.signing_request(key, name),
        name=name,
        labels=labels,
        inventory=inventory,
        agentd_version=__version__,
    )
    with _channel(server, authority.encode()) as channel:
        answer = _call(enrollment_pb2_grpc.EnrollmentStub(channel).Enroll, request, server)
    return _keep(folder, key, answer, enrolled_at=server)


def renew(state_dir: Path) -> Identity:
    """Get a fresh certificate by proving possession of the old one's key. Raises UserError."""
    identity = load(state_dir)
    if identity is None:
        raise UserError(f"the node in {state_dir} is not enrolled: run `agentd enroll`")
    key = keys.load_or_make(identity.key_file)
    server = identity.endpoints.enrollment
    with _channel(server, identity.ca_file.read_bytes()) as channel:
        stub = enrollment_pb2_grpc.EnrollmentStub(channel)
        challenge = enrollment_pb2.ChallengeRequest(node_id=identity.node_id)
        nonce = _call(stub.Challenge, challenge, server).nonce
        csr = keys.signing_request(key, identity.name)
        request = enrollment_pb2.RenewRequest(
            node_id=identity.node_id,
            certificate=identity.certificate_file.read_text(),
            csr=csr,
            nonce=nonce,
            signature=keys.sign(key, nonce + csr),
        )
        answer = _call(stub.Renew, request, server)
    if answer.node_id and answer.node_id != identity.node_id:
        raise UserError("the control plane renewed another node's certificate: nothing was changed")
    return _keep(identity.folder, key, answer, enrolled_at=server, known=identity)


def _channel(server: str, authority: bytes) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(root_certificates=authority)
    return grpc.secure_channel(server, credentials, options=(("grpc.ssl_target_name_override", SERVER_NAME),))


def _call(method, request, server: str):  # type: ignore[no-untyped-def]  # generated stubs have no types
    try:
        return method(request, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise Unreachable(f"cannot reach the control plane at {server}: {details}") from error
        raise UserError(f"the control plane at {server} refused: {details} ({code.name})") from error


def _keep(
    folder: Path,
    key: ec.EllipticCurvePrivateKey,
    answer: enrollment_pb2.EnrollResponse,
    *,
    enrolled_at: str,
    known: Identity | None = None,
) -> Identity:
    not_before_s, not_after_s = keys.lifetime(answer.certificate_chain, key)
    told = Endpoints(answer.endpoints.node_api, answer.endpoints.enrollment or enrolled_at, answer.endpoints.artifacts)
    if known is None:
        identity = Identity(folder, answer.node_id, answer.name, told, not_before_s, not_after_s)
    else:
        identity = replace(known, not_before_s=not_before_s, not_after_s=not_after_s)
    if answer.trusted_ca:
        write_durably(identity.ca_file, answer.trusted_ca.encode())
    write_durably(identity.certificate_file, answer.certificate_chain.encode())
    save(identity)
    fsync_folder(folder.parent)
    return identity
