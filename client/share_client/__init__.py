"""What a data owner runs: training on private data, and the link to the hub."""
