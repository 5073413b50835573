"""Records as TensorBoard's own writer makes them, and as its reader takes them."""

import io
import random

import pytest
from hypothesis import given, strategies as st
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New, masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from lightning_plugins.statistics.tfrecord import checksums, frame


@given(st.lists(st.binary(max_size=300), max_size=80))
def test_checksums_are_tensorboards(records):
    assert checksums(records) == [masked_crc32c(record) for record in records]


@pytest.mark.parametrize("count", [0, 1, 79, 80, 600])
def test_records_are_framed_as_by_tensorboards_writer_and_read_by_its_reader(count, tmp_path):
    made = random.Random(0)
    records = [made.randbytes(made.randrange(300)) for _ in range(count)]
    written = io.BytesIO()
    writer = RecordWriter(written)
    for record in records:
        writer.write(record)
    assert b"".join(frame(records)) == written.getvalue()
    (tmp_path / "records").write_bytes(b"".join(frame(records)))
    reader, read = PyRecordReader_New(str(tmp_path / "records")), []
    for _ in records:
        reader.GetNext()
        read.append(reader.record())
    assert read == records
