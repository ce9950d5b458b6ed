"""A relay: it follows a hub or another relay and serves the signed versions to others. It holds no signing key."""
