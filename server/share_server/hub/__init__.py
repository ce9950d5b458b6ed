"""The hub: one process that owns the state of one space. Run it with ``python -m share_server.hub DIR``."""
