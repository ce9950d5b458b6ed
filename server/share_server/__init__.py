"""The hub of a federation: state, merging, broadcast, identity, and the Flower fleet around it."""
