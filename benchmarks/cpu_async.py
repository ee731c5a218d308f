# SPDX-License-Identifier: Apache-2.0
"""The `vllm` command, with asynchronous scheduling on a CPU where it is asked for, and fewer imports.

vLLM's CPU platform turns it off whatever the user says. Its runner can do it, and so a CPU can try what engines on GPUs
do by default. The platform also gives an engine of one rank a second process, to bind its threads to cores, and spawns
processes, each of which imports vLLM again; here such an engine is one process, and processes are forked. Other
platforms are left as they are.
"""

import os
from typing import Any

from vllm.platforms import current_platform

_check_and_update_config = current_platform.check_and_update_config


def check_and_update_config(vllm_config: Any) -> None:
    scheduler_config = vllm_config.scheduler_config
    async_scheduling = scheduler_config.async_scheduling
    _check_and_update_config(vllm_config)
    scheduler_config.async_scheduling = async_scheduling
    if vllm_config.parallel_config.world_size == 1:
        vllm_config.parallel_config.distributed_executor_backend = "uni"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"


if current_platform.is_cpu():
    current_platform.check_and_update_config = check_and_update_config  # type: ignore[method-assign]

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
