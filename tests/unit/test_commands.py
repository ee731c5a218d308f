# SPDX-License-Identifier: Apache-2.0
"""The console command `vllm-longspec`: what each of its commands does alike."""

import pytest

from vllm_longspec import commands


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_longspec.frequent_tokens.run", stopped)
    with pytest.raises(SystemExit) as error:
        commands.main(["frequent-tokens", "--model", "m", "text"])
    assert error.value.code == 130
    assert capsys.readouterr().err == "vllm-longspec frequent-tokens: stopped\n"
