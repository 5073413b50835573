"""What Ray is told before it is imported: to stay on this machine, to report nothing, to wait for slow ones."""

import os

os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its name for: nothing but the loopback address
    "RAY_USAGE_STATS_ENABLED": "0",
    # its processes import torch one after another, which takes minutes on a busy machine
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}
