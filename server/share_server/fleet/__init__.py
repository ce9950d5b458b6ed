"""The fleet plane: Flower's SuperLink behind a gateway, the thin ServerApp, and the supervisor of all of it."""
