# SPDX-License-Identifier: Apache-2.0
# Read by setup.py and .ci/setup_environment.sh too, before anything is installed: nothing may be imported here.
"""Which versions of vLLM this plugin works with. The only place that says so."""

SUPPORTED = "0.32.*"
