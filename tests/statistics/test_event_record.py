"""The message of a step, against what protocol buffers themselves make of it."""

import math

from hypothesis import example, given, strategies as st
from tensorboard.compat.proto.event_pb2 import Event

from lightning_plugins.statistics.event_record import event_record

numbers = st.floats(width=64) | st.floats(width=32) | st.just(3.4028235677973366e38) | st.just(3.4028235677973362e38)


@given(
    st.integers(0, 2**63 - 1),
    st.floats(0, 1e12),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300), numbers, max_size=5),
)
@example(0, 0.0, {})
@example(127, 1e9, {"batch_loss": 0.5})
@example(128, 1e9, {"l" * 130: math.nan, "inf": math.inf, "low": -math.inf, "large": 1e300, "small": -1e300})
def test_the_bytes_are_those_of_protocol_buffers(step, wall_time, scalars):
    event = Event(wall_time=wall_time, step=step)
    event.summary.SetInParent()
    for tag, value in scalars.items():
        event.summary.value.add(tag=tag, simple_value=value)
    assert event_record(step, wall_time, scalars) == event.SerializeToString()
