"""Pure mathematics and formats of the shared subspace: no sockets, no clock, no framework."""
