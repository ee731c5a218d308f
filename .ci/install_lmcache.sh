#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs LMCache, which a test of tests/integration/test_kv_connectors.py saves blocks with, into the virtual
# environment that is given (default: .venv). It is 18 MB, and not for every platform. Does nothing where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
"$venv/bin/python" -c 'import lmcache' 2>/dev/null && exit
echo "Installing LMCache"
# Its own metadata asks for CUDA, and for other versions of what vLLM has brought along.
"$venv/bin/python" -m pip install --quiet --no-deps \
    lmcache==0.5.6 aiofile aiofiles caio nvtx py-cpuinfo redis sortedcontainers
