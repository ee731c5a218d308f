# SPDX-License-Identifier: Apache-2.0
"""The `vllm` command, with asynchronous scheduling on a CPU where it is asked for.

vLLM's CPU platform turns it off whatever the user says. Its runner can do it, and so a CPU can try what engines on GPUs
do by default. vLLM starts its processes by spawning, and a spawned process imports the main module of the one that
started it, so all of them get what this module replaces.
"""

from typing import Any

from vllm.platforms import current_platform

_check_and_update_config = current_platform.check_and_update_config


def check_and_update_config(vllm_config: Any) -> None:
    scheduler_config = vllm_config.scheduler_config
    async_scheduling = scheduler_config.async_scheduling
    _check_and_update_config(vllm_config)
    scheduler_config.async_scheduling = async_scheduling


current_platform.check_and_update_config = check_and_update_config  # type: ignore[method-assign]

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
