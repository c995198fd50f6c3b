"""The sizes that array_record files declare, read without decoding anything.

These are Riegeli files (google/riegeli, doc/riegeli_records_file_format.md): a sequence of chunks of compressed
records, which a block header interrupts at every multiple of 64 KiB.
"""

import os
import struct

from diffusion.util import open_regular

BLOCK, BLOCK_HEADER = 2**16, 24  # bytes
CHUNK_HEADER = struct.Struct('<8xQ8xQQ')  # size of the data; type (1 byte) and number of records; size when decoded
KINDS = b'smprt'  # signature, metadata, padding, records, transposed records


def largest_chunk(path: str, most: int) -> int:
    """Return the largest size that a chunk declares to have when decoded; array_record decodes no more than that.

    Args:
        path: the file.
        most: the largest size that is allowed, in bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: a chunk declares a larger size, or a header is invalid.
    """
    name, position, largest = os.path.basename(path), 0, 0
    with open_regular(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        while position < size:
            start = os.pread(file.fileno(), CHUNK_HEADER.size + BLOCK_HEADER, position)
            before = -position % BLOCK  # bytes before the next block header
            header = start[:before] + start[before + BLOCK_HEADER :]
            if len(header) < CHUNK_HEADER.size:
                raise ValueError(f'{name} ends within the header of a chunk')
            data_size, kind_and_records, decoded_size = CHUNK_HEADER.unpack_from(header)
            end = _end(position, data_size, kind_and_records >> 8)
            if kind_and_records & 0xFF not in (KINDS if position else b's') or end > size:
                raise ValueError(f'{name} has an invalid header at byte {position}')
            if decoded_size > most:
                raise ValueError(
                    f'{name} has {decoded_size:,} bytes in one chunk of records; at most {most:,} are read, '
                    'which data.max_pixels sets'
                )
            largest, position = max(largest, decoded_size), end
    return largest


def _end(position: int, data_size: int, records: int) -> int:
    """Return where a chunk ends, which begins at `position`; it takes at least as many bytes as it has records."""
    block, offset = divmod(position, BLOCK)
    content = max(offset - BLOCK_HEADER, 0) + CHUNK_HEADER.size + data_size  # from the start of the block, no headers
    blocks, rest = divmod(content, BLOCK - BLOCK_HEADER)
    end = (block + blocks) * BLOCK + (rest and BLOCK_HEADER + rest)
    least = position + records
    if 0 < least % BLOCK <= BLOCK_HEADER:  # no chunk begins within a block header or immediately after it
        least += BLOCK_HEADER + 1 - least % BLOCK
    return max(end, least)
