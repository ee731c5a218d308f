# SPDX-License-Identifier: Apache-2.0
from vllm_longspec.commands import main

if __name__ == "__main__":
    main()
