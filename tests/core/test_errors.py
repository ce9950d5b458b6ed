"""The error tree: drawn as it is, every leaf with a gRPC status."""

from __future__ import annotations

import re

import grpc

from share_core import errors


def test_every_class_has_a_real_status_code() -> None:
    for name, cls in errors.error_classes().items():
        assert hasattr(grpc.StatusCode, cls.grpc_code), name
        assert cls.__doc__, name


def test_the_drawing_in_the_docstring_is_the_tree() -> None:
    drawn = dict(re.findall(r"(\w+Error)\b.* ([A-Z_]{5,})$", errors.__doc__ or "", flags=re.MULTILINE))
    # A package may add a leaf that never travels; what is drawn is what this module defines.
    own = {n: c for n, c in errors.error_classes().items() if c.__module__ == errors.__name__}
    real = {name: cls.grpc_code for name, cls in own.items() if cls is not errors.FedshareError}
    assert drawn == real
