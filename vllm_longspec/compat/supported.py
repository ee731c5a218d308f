# SPDX-License-Identifier: Apache-2.0
# Also read by setup.py, the Makefile and the scripts in .ci before anything is installed: nothing may be imported here.
"""The versions of vLLM that this plugin supports, defined only here."""

SUPPORTED = ">=0.32,<0.34"

# What tests run on: the CPU build that is installed, and a newer release whose Python is laid over it.
TESTED = ("0.32.0", "0.33.0")
