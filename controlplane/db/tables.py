"""Every table of the control plane. Migrations in ``migrations/versions`` are the only way the schema is made; a test
holds them against this file.

Conventions: ids are UUIDv4 text; ``*_at`` is timestamptz by Postgres's clock unless said otherwise;
``resource_version`` counts the writes of a row and is the ETag of REST; a ``spec`` is the validated manifest as it was
applied (camelCase).
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Timestamp = sa.DateTime(timezone=True)
now = sa.func.now()


def _created() -> sa.Column:
    return sa.Column("created_at", Timestamp, nullable=False, server_default=now)


def _updated() -> sa.Column:
    return sa.Column("updated_at", Timestamp, nullable=False, server_default=now)


def _version() -> sa.Column:
    return sa.Column("resource_version", sa.BigInteger, nullable=False, server_default="1")


def _json(name: str, default: str = "{}") -> sa.Column:
    return sa.Column(name, JSONB, nullable=False, server_default=sa.text(f"'{default}'::jsonb"))


# --- the installation ---------------------------------------------------------------------------------------------

# key "timeline": the id of the history that desired-state generations count in.
settings = sa.Table(
    "settings",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

# Running control-plane processes. lease_until passes = that replica is dead.
replicas = sa.Table(
    "replicas",
    metadata,
    sa.Column("replica_id", sa.Text, primary_key=True),
    sa.Column("started_at", Timestamp, nullable=False, server_default=now),
    sa.Column("lease_until", Timestamp, nullable=False),
)

# One row a controller: the holder may write only while epoch is its own (fencing).
leaders = sa.Table(
    "leaders",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("lease_until", Timestamp, nullable=False),
)

# Keys of people and programs. role: admin (REST and gateway) or gateway (the gateway only). Only a hash is kept.
api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("secret_sha256", sa.Text, nullable=False, unique=True),
    sa.Column("expires_at", Timestamp),
    sa.Column("revoked_at", Timestamp),
    _created(),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("at", Timestamp, nullable=False, server_default=now),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("object", sa.Text, nullable=False),
    _json("detail"),
)

# What happened, for people: fleetctl describe shows the newest of an object. Never prompts or answers.
events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("at", Timestamp, nullable=False, server_default=now, index=True),
    sa.Column("severity", sa.Text, nullable=False),
    # e.g. "node/edge-1", "deployment/greeter"
    sa.Column("object", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Index("ix_events_object_id", "object", "id"),
)

# --- nodes ----------------------------------------------------------------------------------------------------------

enrollment_tokens = sa.Table(
    "enrollment_tokens",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("secret_sha256", sa.Text, nullable=False, unique=True),
    # Put on every node that enrols with it, over what the node asks for.
    _json("labels"),
    sa.Column("uses_left", sa.Integer, nullable=False),
    sa.Column("expires_at", Timestamp, nullable=False),
    sa.Column("revoked_at", Timestamp),
    _created(),
)

nodes = sa.Table(
    "nodes",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    _json("labels"),
    _json("inventory"),
    _json("features", "[]"),
    # Hex digests of the files that it had, verified, when its session began.
    _json("artifacts", "[]"),
    sa.Column("agentd_version", sa.Text, nullable=False, server_default=""),
    sa.Column("boot_id", sa.Text, nullable=False, server_default=""),
    sa.Column("local_api", sa.Text, nullable=False, server_default=""),
    # Wish of the operator: takes no new work.
    sa.Column("drained", sa.Boolean, nullable=False, server_default=sa.false()),
    # Verdict of the liveness controller: online, suspect, disconnected, lost, reconciling, draining, drained.
    sa.Column("state", sa.Text, nullable=False, server_default="disconnected"),
    sa.Column("state_since", Timestamp, nullable=False, server_default=now),
    sa.Column("state_reason", sa.Text, nullable=False, server_default=""),
    # MQTT presence, as last heard: true/false/null = never.
    sa.Column("presence", sa.Boolean),
    sa.Column("telemetry_at", Timestamp),
    # Password of the node at the embedded broker; encrypted or unused elsewhere.
    sa.Column("mqtt_password", sa.Text),
    sa.Column("revoked_at", Timestamp),
    _created(),
    _updated(),
    _version(),
)

node_certificates = sa.Table(
    "node_certificates",
    metadata,
    sa.Column("fingerprint_sha256", sa.Text, primary_key=True),
    sa.Column("node_id", sa.ForeignKey("nodes.id", ondelete="CASCADE"), nullable=False, index=True),
    # Hex SHA-256 of the public key (SubjectPublicKeyInfo, DER): a node that enrols again with its key is that node.
    sa.Column("key_sha256", sa.Text, nullable=False, server_default=""),
    sa.Column("not_after", Timestamp, nullable=False),
    _created(),
)

# The session that a node holds, and at which replica. disconnected_at null = the stream is open.
node_sessions = sa.Table(
    "node_sessions",
    metadata,
    sa.Column("node_id", sa.ForeignKey("nodes.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("replica_id", sa.Text, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("connected_at", Timestamp, nullable=False, server_default=now),
    sa.Column("last_seen_at", Timestamp, nullable=False, server_default=now),
    sa.Column("disconnected_at", Timestamp),
    sa.Column("disconnect_reason", sa.Text, nullable=False, server_default=""),
)

# What the node should be, newest only, and what it said of it.
desired_states = sa.Table(
    "desired_states",
    metadata,
    sa.Column("node_id", sa.ForeignKey("nodes.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("timeline", sa.Text, nullable=False),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.LargeBinary, nullable=False),
    # Serialized slmfleet.v1.NodeDocument.
    sa.Column("document", sa.LargeBinary, nullable=False),
    _json("required_features", "[]"),
    _updated(),
    sa.Column("applied_generation", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("applied_at", Timestamp),
    sa.Column("refused", sa.Text, nullable=False, server_default=""),
)

operations = sa.Table(
    "operations",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("node_id", sa.ForeignKey("nodes.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("kind", sa.Text, nullable=False),
    _json("arguments"),
    sa.Column("expires_at", Timestamp, nullable=False),
    # pending, succeeded, failed, expired
    sa.Column("state", sa.Text, nullable=False, server_default="pending"),
    sa.Column("message", sa.Text, nullable=False, server_default=""),
    sa.Column("result", JSONB),
    _created(),
    _updated(),
)

# --- what operators declare -----------------------------------------------------------------------------------------

groups = sa.Table(
    "groups",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("selector", sa.Text, nullable=False),
    _json("labels"),
    _json("annotations"),
    _created(),
    _updated(),
    _version(),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    _json("labels"),
    _json("annotations"),
    # The version that was applied last; deployments that name no version pin it.
    sa.Column("current_version", sa.Text, nullable=False),
    _created(),
    _updated(),
    _version(),
)

# Immutable once ready. phase: pending, fetching, ready, failed.
model_versions = sa.Table(
    "model_versions",
    metadata,
    sa.Column("model", sa.ForeignKey("models.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("version", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    _json("spec"),
    # Variants with their files by digest and size, known when phase is ready: [{name, format, quantization, files}].
    _json("variants", "[]"),
    sa.Column("phase", sa.Text, nullable=False, server_default="pending"),
    sa.Column("message", sa.Text, nullable=False, server_default=""),
    sa.Column("bytes_done", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("bytes_total", sa.BigInteger, nullable=False, server_default="0"),
    _created(),
    _updated(),
)

# Verified files in the artifact store.
blobs = sa.Table(
    "blobs",
    metadata,
    sa.Column("sha256", sa.Text, primary_key=True),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    _created(),
)

agents = sa.Table(
    "agents",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    _json("labels"),
    _json("annotations"),
    sa.Column("current_digest", sa.Text, nullable=False),
    _created(),
    _updated(),
    _version(),
)

agent_versions = sa.Table(
    "agent_versions",
    metadata,
    sa.Column("agent", sa.ForeignKey("agents.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    _json("spec"),
    _created(),
    sa.UniqueConstraint("agent", "number"),
)

deployments = sa.Table(
    "deployments",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    _json("labels"),
    _json("annotations"),
    _json("spec"),
    sa.Column("current_revision", sa.BigInteger, nullable=False, server_default="0"),
    # Written by the placement controller: {desired, ready, warm, unplaced: [{count, reason}], message}.
    _json("status"),
    _created(),
    _updated(),
    _version(),
)

# A deployment with its model and agent pinned by digest; immutable.
revisions = sa.Table(
    "revisions",
    metadata,
    sa.Column("deployment", sa.ForeignKey("deployments.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True),
    # {spec, agent: {name, digest} | null, model: {name, version, digest}}
    _json("pinned"),
    _created(),
)

# A replica: one deployment revision on one node. removed_at null = wanted.
assignments = sa.Table(
    "assignments",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("deployment", sa.Text, nullable=False, index=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("node_id", sa.ForeignKey("nodes.id", ondelete="CASCADE"), nullable=False, index=True),
    # Why it was placed here, as the planner said.
    sa.Column("reason", sa.Text, nullable=False, server_default=""),
    _created(),
    sa.Index("uq_assignments_deployment_node_id", "deployment", "node_id", unique=True),
)

# What the node says of it, newest only.
assignment_statuses = sa.Table(
    "assignment_statuses",
    metadata,
    sa.Column("assignment_id", sa.ForeignKey("assignments.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("observed_generation", sa.BigInteger, nullable=False),
    sa.Column("staged", sa.Boolean, nullable=False),
    sa.Column("ready", sa.Boolean, nullable=False),
    sa.Column("warm", sa.Boolean, nullable=False),
    sa.Column("degraded", sa.Boolean, nullable=False),
    # [{type, status, reason, message, changedAt}]
    _json("conditions", "[]"),
    sa.Column("variant", sa.Text, nullable=False, server_default=""),
    sa.Column("bytes_done", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("bytes_total", sa.BigInteger, nullable=False, server_default="0"),
    _updated(),
)

# --- telemetry --------------------------------------------------------------------------------------------------------

# Ranges of outbox rows that are committed here, so that a batch that comes twice counts once.
outbox_ranges = sa.Table(
    "outbox_ranges",
    metadata,
    sa.Column("node_id", sa.Text, primary_key=True),
    sa.Column("stream", sa.Text, primary_key=True),
    sa.Column("epoch", sa.BigInteger, primary_key=True),
    sa.Column("first", sa.BigInteger, primary_key=True),
    sa.Column("last", sa.BigInteger, nullable=False),
    sa.Column("dropped", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("received_at", Timestamp, nullable=False, server_default=now),
)

# One wide row per node and interval. Columns for what is asked of it most; the whole row as protobuf beside them.
node_metrics = sa.Table(
    "node_metrics",
    metadata,
    sa.Column("node_id", sa.Text, primary_key=True),
    sa.Column("epoch", sa.BigInteger, primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    # By the node's clock.
    sa.Column("at", Timestamp, nullable=False),
    sa.Column("received_at", Timestamp, nullable=False, server_default=now),
    sa.Column("boot_id", sa.Text, nullable=False),
    sa.Column("boottime_ms", sa.BigInteger, nullable=False),
    sa.Column("cpu_fraction", sa.Float, nullable=False),
    sa.Column("memory_used_bytes", sa.BigInteger, nullable=False),
    sa.Column("in_flight", sa.Integer, nullable=False),
    sa.Column("output_tokens", sa.BigInteger, nullable=False),
    sa.Column("requests_ok", sa.BigInteger, nullable=False),
    sa.Column("requests_failed", sa.BigInteger, nullable=False),
    # Serialized slmfleet.v1.MetricRow.
    sa.Column("row", sa.LargeBinary, nullable=False),
    sa.Index("ix_node_metrics_node_id_at", "node_id", "at"),
)
