"""``share-space``: shared subspaces as files, without a server.

:mod:`~share_core.space_tool.spacefile` is the file and :mod:`~share_core.space_tool.header` its header,
:mod:`~share_core.space_tool.build` makes and changes one from adapter directories,
:mod:`~share_core.space_tool.backbone` takes fingerprints from a model's files, :mod:`~share_core.space_tool.check`
verifies and compares, :mod:`~share_core.space_tool.report` and :mod:`~share_core.space_tool.plot` show,
:mod:`~share_core.space_tool.cli` is the command line.
"""
