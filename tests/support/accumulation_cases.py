"""The combinations that the gradients are checked in, for one process and for two."""

import torch

from tests.support.accumulation_runs import Case

TWO = [[0, 1], [2, 3], [4]]
CARRIED = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]

CASES = {
    "uneven batches, short last window": Case(TWO, arguments={"batches": 2}),
    "tokens, one batch masked": Case(TWO, arguments={"batches": 2}, tokens=True),
    "one window an epoch": Case([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], arguments={"batches": 16}, epochs=2),
    "one batch a step": Case([[0], [1], [2], [3], [4]], arguments={"batches": 1}),
    "scaler": Case(TWO, arguments={"batches": 2}, precision="scaler"),
    "scaler, tokens": Case(TWO, arguments={"batches": 2}, precision="scaler", tokens=True),
    "clipping": Case(TWO, arguments={"batches": 2}, clip=0.05),
    "clipping, scaler, tokens": Case(TWO, arguments={"batches": 2}, clip=0.05, precision="scaler", tokens=True),
    # batch 0 | batch 1 | then 3 at a time, aligned to multiples of 3: batch 2 alone is the short window at the joint
    "schedule": Case(
        [[0], [1], [2], [3, 4, 5], [6, 7], [8, 9, 10], [11, 12, 13], [14, 15]],
        sizes=((4, 7, 2, 5, 3, 1, 6, 2), (6, 1, 8, 2, 9, 3, 1, 5)),
        arguments={"schedule": {0: 1, 2: 3}},
        epochs=2,
    ),
    "carry": Case(CARRIED, arguments={"batches": 2, "carry": True}, epochs=2),
    "carry, tokens": Case(CARRIED, arguments={"batches": 2, "carry": True}, epochs=2, tokens=True),
    "carry, scaler, clipping": Case(
        CARRIED, arguments={"batches": 2, "carry": True}, epochs=2, precision="scaler", clip=0.05
    ),
    "carry over whole epochs, schedule": Case(
        [[0], [1, 2, 3, 4, 5, 6, 7], [8, 9]], arguments={"schedule": {0: 1, 1: 7}, "carry": True}, epochs=2
    ),
}

BOUND = {torch.float32: 5e-7, torch.float64: 1e-14}

# FSDP2 in single precision: a carried window is refused there, and a plugin would have to be of its own kind
SHARDED = [name for name, case in CASES.items() if not case.arguments.get("carry") and case.precision is None]
