# SPDX-License-Identifier: Apache-2.0
# Also read by setup.py and .ci/setup_environment.sh before anything is installed: nothing may be imported here.
"""The versions of vLLM that this plugin supports, defined only here."""

SUPPORTED = "0.32.*"
