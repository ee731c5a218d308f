#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs NIXL, with which tests/integration/test_nixl.py moves a cache from one engine to another, into the virtual
# environment that is given (default: .venv). It is 70 MB, and not for every platform. Does nothing where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
"$venv/bin/python" -c 'import nixl' 2>/dev/null && exit
echo "Installing NIXL"
# Its own metadata asks for a build for each CUDA version, of which one does, and for torch, which is there.
"$venv/bin/python" -m pip install --quiet --no-deps nixl nixl-cu12
