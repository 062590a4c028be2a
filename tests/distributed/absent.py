"""Two ranks, of which the second does not join; run by test_processes.py."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    if os.environ["LOCAL_RANK"] == "1":
        sys.exit(int(sys.argv[1]))
    import torch

    torch.distributed.init_process_group("gloo", rank=0, world_size=int(os.environ["WORLD_SIZE"]))
