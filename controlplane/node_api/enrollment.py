"""Enrollment: how a device becomes a node and stays one. Server TLS; the caller has no certificate, or an old one.

This port is open to strangers: requests are small (the server bounds them), what is cheap is checked first, and a peer
that fails often must wait.
"""

from __future__ import annotations

import asyncio
import datetime
import secrets
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import sqlalchemy as sa
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from controlplane.db import nodes
from controlplane.domain import names
from controlplane.node_api import messages, tokens
from controlplane.node_api.identity import peer_address, refuse
from controlplane.node_api.pki import BadRequest, NodeCertificate, Pki, csr_key, fingerprint, key_sha256
from slmfleet import logs
from slmfleet.v1 import enrollment_pb2 as pb
from slmfleet.v1 import enrollment_pb2_grpc

log = logs.get(__name__)

_NONCE_TTL_S = 60.0
_MAX_NONCES = 10_000
# A peer may fail this often at once; then one more try each _FAILURE_REFILL_S.
_FAILURES = 10
_FAILURE_REFILL_S = 6.0
_MAX_PEERS = 10_000
_MAX_LABELS = 64
# Transactions at once: a whole fleet that enrols leaves connections for the others.
_AT_ONCE = 8
_ANY_TIME = datetime.datetime.fromtimestamp(0, datetime.UTC)


class Refusal(Exception):
    """A call that ends with a status instead of an answer."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(slots=True)
class FailureLimit:
    """Token bucket per peer over failed calls; ``now`` in seconds of any monotonic clock. Bounded: forgets the peer
    that failed longest ago."""

    _peers: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)  # peer -> (tokens, at)

    def wait_s(self, peer: str, now: float) -> float:
        """Seconds until the peer may try again; 0 = now."""
        left = self._left(peer, now)
        return 0.0 if left >= 1 else (1 - left) * _FAILURE_REFILL_S

    def failed(self, peer: str, now: float) -> None:
        """The peer's call failed."""
        self._peers[peer] = (max(0.0, self._left(peer, now) - 1), now)
        self._peers.move_to_end(peer)
        if len(self._peers) > _MAX_PEERS:
            self._peers.popitem(last=False)

    def _left(self, peer: str, now: float) -> float:
        left, at = self._peers.get(peer, (float(_FAILURES), now))
        return min(float(_FAILURES), left + (now - at) / _FAILURE_REFILL_S)


class EnrollmentService(enrollment_pb2_grpc.EnrollmentServicer):
    """The gRPC handler of Enroll, Challenge and Renew."""

    def __init__(
        self, engine: AsyncEngine, pki: Pki, endpoints: Callable[[], pb.Endpoints], *, certificate_days: float = 30.0
    ) -> None:
        self._engine = engine
        self._pki = pki
        self._endpoints = endpoints
        self._days = certificate_days
        self._failures = FailureLimit()
        self._places = asyncio.Semaphore(_AT_ONCE)
        # nonce -> (node id, loop time until which it is good); the oldest first
        self._nonces: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    async def Enroll(self, request: pb.EnrollRequest, context: grpc.aio.ServicerContext) -> pb.EnrollResponse:
        """A token and a CSR in, a client certificate out."""
        return await self._answer(context, lambda: self._enroll(request))

    async def Challenge(self, request: pb.ChallengeRequest, context: grpc.aio.ServicerContext) -> pb.ChallengeResponse:
        """A nonce for Renew. Unknown nodes get one too: whether an id exists is nobody's business here."""
        nonce = secrets.token_bytes(32)
        self._nonces[nonce] = (request.node_id, asyncio.get_running_loop().time() + _NONCE_TTL_S)
        if len(self._nonces) > _MAX_NONCES:
            self._nonces.popitem(last=False)
        return pb.ChallengeResponse(nonce=nonce)

    async def Renew(self, request: pb.RenewRequest, context: grpc.aio.ServicerContext) -> pb.EnrollResponse:
        """A fresh certificate for whoever holds the key of the old one, expired or not."""
        return await self._answer(context, lambda: self._renew(request))

    async def _answer(
        self, context: grpc.aio.ServicerContext, work: Callable[[], Awaitable[pb.EnrollResponse]]
    ) -> pb.EnrollResponse:
        loop = asyncio.get_running_loop()
        peer = peer_address(context)
        if (wait_s := self._failures.wait_s(peer, loop.time())) > 0:
            message = f"too many failed attempts from here: try again in {wait_s:.0f} s"
            await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        try:
            return await work()
        except Refusal as refusal:
            self._failures.failed(peer, loop.time())
            log.warning("enrolment refused", peer=peer, code=refusal.code.name, reason=refusal.message)
            await refuse(context, refusal.code, refusal.message)
        except (OSError, sa.exc.InterfaceError, sa.exc.OperationalError, sa.exc.TimeoutError) as error:
            log.warning("cannot enrol: the database is not there", error=error)
            await refuse(context, grpc.StatusCode.UNAVAILABLE, "the control plane has no database now: try again")

    # --- Enroll ---------------------------------------------------------------------------------------------------

    async def _enroll(self, request: pb.EnrollRequest) -> pb.EnrollResponse:
        try:
            token = tokens.parse(request.token)
        except ValueError as error:
            raise Refusal(grpc.StatusCode.UNAUTHENTICATED, str(error)) from None
        try:
            names.check_name(request.name)
            wished = _checked_labels(dict(request.labels))
        except ValueError as error:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        key = _key_of(request.csr)
        async with self._places, self._engine.begin() as connection:
            row = await nodes.lock_token(connection, token.id)
            stored = tokens.StoredToken(row.secret_sha256, row.uses_left, row.expires_at, row.revoked) if row else None
            # A node whose answer was lost asks again with the same key: it is that node, and the token was used by it.
            node_id = None
            if stored is not None and not stored.revoked and tokens.genuine(stored, token.secret):
                node_id = await nodes.find_by_key(connection, request.name, key)
            if node_id is None:
                # The database's clock decides; without a row the time does not matter.
                why_not = tokens.judge(stored, token.secret, row.now if row else _ANY_TIME)
                if why_not or row is None:
                    raise Refusal(grpc.StatusCode.UNAUTHENTICATED, why_not or "token is unknown")
                node_id = await _create(connection, request, {**wished, **row.labels})
                await nodes.use_token(connection, token.id)
            signed = self._sign(request.csr, node_id)
            await _remember(connection, node_id, signed)
        log.info("node enrolled", node=request.name, node_id=node_id, token=token.id)
        return self._response(node_id, request.name, signed)

    def _sign(self, csr: bytes, node_id: str) -> NodeCertificate:
        try:
            return self._pki.sign_node_csr(csr, node_id, days=self._days)
        except BadRequest as error:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None

    def _response(self, node_id: str, name: str, signed: NodeCertificate) -> pb.EnrollResponse:
        response = pb.EnrollResponse(
            node_id=node_id,
            name=name,
            certificate_chain=signed.chain_pem,
            trusted_ca=self._pki.ca_pem.decode(),
            endpoints=self._endpoints(),
        )
        response.not_after.FromDatetime(signed.not_after)
        return response

    # --- Renew ----------------------------------------------------------------------------------------------------

    async def _renew(self, request: pb.RenewRequest) -> pb.EnrollResponse:
        self._use_nonce(request)
        old = _proven_certificate(request)
        signed = self._sign(request.csr, request.node_id)
        async with self._places, self._engine.begin() as connection:
            node = await nodes.find(connection, request.node_id, lock=True)
            if node is None or not await nodes.holds_certificate(connection, request.node_id, fingerprint(old)):
                message = "this certificate is of no node here: enrol again with a new token"
                raise Refusal(grpc.StatusCode.UNAUTHENTICATED, message)
            if node.revoked:
                message = "this node was revoked: enrol it again with a new token"
                raise Refusal(grpc.StatusCode.PERMISSION_DENIED, message)
            await _remember(connection, node.id, signed)
        log.info("certificate renewed", node=node.name, not_after=signed.not_after.isoformat())
        return self._response(node.id, node.name, signed)

    def _use_nonce(self, request: pb.RenewRequest) -> None:
        node_id, good_until = self._nonces.pop(request.nonce, ("", 0.0))
        if not node_id or node_id != request.node_id or good_until < asyncio.get_running_loop().time():
            message = "nonce is unknown, used or older than a minute: ask for another with Challenge"
            raise Refusal(grpc.StatusCode.UNAUTHENTICATED, message)


def _checked_labels(labels: dict[str, str]) -> dict[str, str]:
    if len(labels) > _MAX_LABELS:
        raise ValueError(f"{len(labels)} labels are too many: a node may wish for {_MAX_LABELS}")
    for key, value in labels.items():
        names.check_label_key(key)
        names.check_label_value(value)
    return labels


def _key_of(csr: bytes) -> str:
    try:
        return key_sha256(csr_key(csr))
    except BadRequest as error:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None


async def _create(connection: AsyncConnection, request: pb.EnrollRequest, labels: dict[str, str]) -> str:
    """Make the node; its id. Raises Refusal when its name is taken."""
    node = nodes.NewNode(
        id=str(uuid.uuid4()),
        name=request.name,
        labels=labels,
        inventory=messages.inventory(request.inventory),
        agentd_version=messages.text(request.agentd_version),
        mqtt_password=secrets.token_urlsafe(24),
    )
    if not await nodes.create(connection, node):
        message = f'a node named "{request.name}" exists: choose another name, or delete that node first'
        raise Refusal(grpc.StatusCode.ALREADY_EXISTS, message)
    return node.id


async def _remember(connection: AsyncConnection, node_id: str, signed: NodeCertificate) -> None:
    await nodes.add_certificate(connection, node_id, signed.fingerprint, signed.key_sha256, signed.not_after)


def _proven_certificate(request: pb.RenewRequest) -> x509.Certificate:
    """The old certificate, if ``signature`` was made with its key. Whose it is, the database knows."""
    try:
        certificate = x509.load_pem_x509_certificate(request.certificate.encode())
        key = certificate.public_key()
    except ValueError:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "certificate is no certificate (PEM)") from None
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidSignature
        key.verify(request.signature, request.nonce + request.csr, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        message = "signature is not by the key of the old certificate over nonce and csr"
        raise Refusal(grpc.StatusCode.UNAUTHENTICATED, message) from None
    return certificate
