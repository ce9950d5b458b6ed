"""Merging what not everybody may be trusted with: pure rules, chosen in the server's TOML (TRUST, robust merging)."""
