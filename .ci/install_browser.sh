#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs Chromium, in which tests/unit/test_report_page.py opens the report of `vllm-longspec bench`, from the
# distribution's packages (Debian's: some 100 MB, a minute). Does nothing where there is one.
set -euo pipefail

command -v chromium >/dev/null && exit
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "there is no Chromium, and it can only be installed here by root with apt-get: install it as chromium" >&2
    exit 1
fi
echo "Installing Chromium"
apt-get -qq -o Acquire::Retries=3 update
DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=3 install -y --no-install-recommends chromium >/dev/null
