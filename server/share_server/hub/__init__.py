"""The hub: one process that owns the state of one space. Run it with ``python -m share_server.hub DIR``."""

import os

# gRPC writes lines of its own to stderr, which are no JSON and which any stranger can cause. It reads this only once,
# when it is first imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
