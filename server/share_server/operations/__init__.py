"""What an operator does with a server directory: prove it, copy it, bring it back, make its space anew.

The commands are in :mod:`share_server.operations.cli`. All but a backup of a running hub need the hub to be stopped.
"""
