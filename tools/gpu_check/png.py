"""PNG files of 8-bit RGB, as the program writes them: reading, and writing for its inputs. Standard library only."""

import struct
import zlib

from .record import Failure

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunks(data, path):
    if data[:8] != SIGNATURE:
        raise Failure(f"{path}: not a PNG")
    at = 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at:at + 4])
        yield data[at + 4:at + 8], data[at + 8:at + 8 + size]
        at += 12 + size


def read(path):
    """Width, height and the bytes of all pixels."""
    header, packed = None, b""
    for name, body in chunks(path.read_bytes(), path):
        if name == b"IHDR":
            header = struct.unpack(">IIBBBBB", body)
        elif name == b"IDAT":
            packed += body
    if header is None or header[2:] != (8, 2, 0, 0, 0):
        raise Failure(f"{path}: not an 8-bit RGB picture without interlace")
    width, height = header[:2]
    lines, stride = zlib.decompress(packed), 3 * width + 1
    pixels, above = bytearray(), bytearray(3 * width)
    for row in range(height):
        line = lines[row * stride:(row + 1) * stride]
        above = unfiltered(line[0], bytearray(line[1:]), above)
        pixels += above
    return width, height, bytes(pixels)


def unfiltered(kind, line, above):
    """Undoes a line's filter (PNG specification, 9.2); three bytes are a pixel."""
    for i in range(len(line)):
        left, up, corner = (line[i - 3] if i >= 3 else 0), above[i], (above[i - 3] if i >= 3 else 0)
        if kind == 1:
            line[i] = (line[i] + left) & 255
        elif kind == 2:
            line[i] = (line[i] + up) & 255
        elif kind == 3:
            line[i] = (line[i] + (left + up) // 2) & 255
        elif kind == 4:
            estimate = left + up - corner
            line[i] = (line[i] + min((left, up, corner), key=lambda value: abs(estimate - value))) & 255
    return line


def levels(paths):
    """The mean level of each picture, 0 to 255."""
    pictures = [read(path)[2] for path in paths]
    if not pictures:
        raise Failure("found no pictures")
    return [sum(pixels) / len(pixels) for pixels in pictures]


def difference(found, expected):
    """The mean absolute difference of two lists of pictures, in levels."""
    total = count = 0
    for one, other in zip(found, expected):
        a, b = read(one), read(other)
        if a[:2] != b[:2]:
            raise Failure(f"{one.name}: {a[0]} x {a[1]} pixels, expected {b[0]} x {b[1]}")
        total += sum(abs(x - y) for x, y in zip(a[2], b[2]))
        count += len(a[2])
    if not count or len(found) != len(expected):
        raise Failure(f"found {len(found)} pictures, expected {len(expected)}")
    return total / count


def write(path, width, height, pixels):
    """Writes RGB bytes, without filters."""
    rows = b"".join(b"\0" + pixels[3 * width * row:3 * width * (row + 1)] for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(SIGNATURE)
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
