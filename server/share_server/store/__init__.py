"""What the hub promises, it has written here first.

See :mod:`share_server.store.store` for the order of writing, :mod:`share_server.store.blobs` for payload
files and :mod:`share_server.store.journal` for the rows.
"""
