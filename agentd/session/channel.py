"""The gRPC channel to the control plane: mutual TLS, the node's certificate, the pinned name."""

from __future__ import annotations

import os

# Before grpc is imported: its core is otherwise told to survive fork(), which costs a thread handshake at each child.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio

from agentd.identity.files import SERVER_NAME, Identity

# A desired state with hundreds of assignments is larger than gRPC's default of 4 MiB.
MAX_MESSAGE_BYTES = 32 * 2**20


def open_channel(identity: Identity) -> grpc.aio.Channel:
    """A channel that reads the certificate files now: after a renewal the next channel shows the new one."""
    credentials = grpc.ssl_channel_credentials(
        root_certificates=identity.ca_file.read_bytes(),
        private_key=identity.key_file.read_bytes(),
        certificate_chain=identity.certificate_file.read_bytes(),
    )
    options = (
        ("grpc.ssl_target_name_override", SERVER_NAME),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # Each attempt has a channel of its own; without this they would share connections and old certificates.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
    )
    return grpc.aio.secure_channel(identity.endpoints.node_api, credentials, options=options)
