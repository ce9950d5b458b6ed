#!/bin/sh
# Regenerate the committed stubs: proto/generate.sh [OUT]. Needs the pinned grpcio-tools of the dev extra.
set -eu
cd "$(dirname "$0")"
out=${1:-.}
python=${PYTHON:-python3}
PATH="$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH" "$python" -m grpc_tools.protoc -I . \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" share_proto/v1/*.proto
