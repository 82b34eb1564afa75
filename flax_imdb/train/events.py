"""TensorBoard's event files: what an event is, byte by byte."""

from collections.abc import Iterable
import struct
import time
from typing import Any

# The first event of each file.
VERSION = {'file_version': 'brain.Event:2'}


def scalars(values: dict[str, float]) -> dict[str, Any]:
  """Numbers by their tags, as a summary."""
  return {'value': [{'tag': tag, 'simple_value': value}
                    for tag, value in values.items()]}


def records(events: Iterable[dict[str, Any]]) -> bytes:
  """Events as TensorBoard reads them: length, CRC of it, bytes, CRC of them.

  They are fields of its Event, such as 'step' and 'summary'. Not tensorboardX'
  SummaryWriter, whose thread loses its queue in a kill.
  """
  # Only now: it imports PyTorch where there is one, a second that the first
  # step need not wait for.
  from tensorboardX.proto.event_pb2 import Event
  from tensorboardX.record_writer import masked_crc32c

  found = []
  for event in events:
    content = Event(wall_time=time.time(), **event).SerializeToString()
    found += [part + struct.pack('<I', masked_crc32c(part)) for part in (
        struct.pack('<Q', len(content)), content)]
  return b''.join(found)
