"""Wire contract of fedshare: protobuf messages and gRPC services, generated and committed."""
