"""gRPC channel arguments of the two listeners."""

from __future__ import annotations

MESSAGE_BYTES = 4 * 2**20
"""Largest message in either direction."""

CHUNK_BYTES = 2**20
"""Largest chunk accepted; also the size of the chunks sent."""

_COMMON: list[tuple[str, int]] = [
    ("grpc.so_reuseport", 0),  # 1, the default, lets a second server bind the same port without a word
    ("grpc.compression_enabled_algorithms_bitset", 1),  # identity only: nothing is inflated before its size is known
    ("grpc.max_metadata_size", 8192),
    ("grpc.absolute_max_metadata_size", 16384),
    ("grpc.max_connection_idle_ms", 600_000),
    ("grpc.max_connection_age_ms", 1_800_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
]

HUB_OPTIONS: list[tuple[str, int]] = [
    *_COMMON,
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 100),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.http2.max_ping_strikes", 2),
]
"""The listener of Hub, Fleet and Health."""

ENROLMENT_OPTIONS: list[tuple[str, int]] = [
    *_COMMON,
    ("grpc.max_receive_message_length", 64 * 2**10),
    ("grpc.max_send_message_length", 64 * 2**10),
    ("grpc.max_concurrent_streams", 4),
]
"""The listener of Enrolment, open to strangers."""
