"""What a file's own format says of it, read without the program: the rule for damage that may pass.

A file that its format refuses (JSON, TOML, safetensors' header, PNG's checksums) has to be refused or spoken of; what is still
a good file is another input, and all that comes out of it has to be numbers.
"""

import csv
import io
import json
import math
import struct
import zlib

try:
    import tomllib
except ImportError:  # before Python 3.11 TOML is taken as it is
    tomllib = None

WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
          "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}


def _refuse(text):
    raise ValueError(f"no JSON: {text}")


def _number(text):
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def read_json(content):
    return json.loads(content.decode("utf-8"), parse_constant=_refuse, parse_float=_number)


def safetensors(content):
    """Header and data of a safetensors file; ValueError for what is none."""
    size = struct.unpack_from("<Q", content)[0]
    if size > len(content) - 8:
        raise ValueError("the header is longer than the file")
    header = read_json(content[8:8 + size])
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    return header, content[8 + size:]


def tensor_bytes(header, data):
    """Name, dtype and bytes of each tensor of a file whose header is honest; ValueError else."""
    spans = []
    for name, info in header.items():
        if name == "__metadata__":
            continue
        (start, end), shape, dtype = info["data_offsets"], info["shape"], info["dtype"]
        if end - start != WIDTHS[dtype] * math.prod(shape) or min([start, *shape]) < 0:
            raise ValueError(f"{name}: sizes")
        spans.append((start, end, name, dtype))
    at = 0
    for start, end, name, dtype in sorted(spans):
        if start != at:
            raise ValueError(f"{name}: a gap")
        at = end
        yield name, dtype, data[start:end]
    if at != len(data):
        raise ValueError("bytes behind the last tensor")


def is_finite(dtype, values):
    """Whether a tensor's bytes are all numbers; by exponents, since Python has no bf16."""
    if dtype == "F32":
        exponents, step, mask = memoryview(values), 4, None
        return all((exponents[i + 3] & 0x7F) != 0x7F or exponents[i + 2] < 0x80 for i in range(0, len(values), step))
    if dtype == "F16":
        return all((values[i + 1] & 0x7C) != 0x7C for i in range(0, len(values), 2))
    if dtype == "BF16":
        return all((values[i + 1] & 0x7F) != 0x7F or values[i] < 0x80 for i in range(0, len(values), 2))
    if dtype == "F64":
        return all(map(math.isfinite, struct.unpack(f"<{len(values) // 8}d", values)))
    return True


def check_safetensors(content):
    for name, dtype, values in tensor_bytes(*safetensors(content)):
        if not is_finite(dtype, values):
            raise ValueError(f"{name}: not a number")


def png_chunks(content):
    """Kind and body of each chunk, whatever its checksum."""
    at, found = 8, []
    while at + 12 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        found.append((kind, content[at + 8:at + 8 + size]))
        at += 12 + size
    return found


def check_png(content):
    """Checksums of all chunks, and as many pixels as the header says."""
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("no PNG")
    at, data, header = 8, b"", None
    while True:
        size, kind = struct.unpack_from(">I4s", content, at)
        body = content[at + 8:at + 8 + size]
        if len(body) != size or zlib.crc32(kind + body) != struct.unpack_from(">I", content, at + 8 + size)[0]:
            raise ValueError(f"chunk {kind!r}")
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            data += body
        elif kind == b"IEND":
            break
        at += 12 + size
    width, height, depth, colour, *_, interlaced = header
    row = (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] + 7) // 8 + 1
    # Without zlib's header and its own checksum, which readers pass over: the chunks' stand for the data.
    pixels = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[2:], 1 << 26)
    if not width or not height or (not interlaced and len(pixels) < min(row * height, 1 << 26)):
        raise ValueError("pixels are missing")


def check_table(content):
    # As lenient with quotes as Python's readers of data sets are.
    rows = list(csv.reader(io.StringIO(content.decode("utf-8"))))
    if not rows or any(len(row) != len(rows[0]) for row in rows if row):
        raise ValueError("rows of several widths")


def problem(name, content):
    """Why `content` is no good file of its kind; None where it is one, or where its kind has no rule that we know."""
    try:
        if name.endswith(".safetensors"):
            check_safetensors(content)
        elif name.endswith(".json"):
            read_json(content)
        elif name.endswith(".jsonl"):
            for line in content.decode("utf-8").splitlines():
                if line.strip():
                    read_json(line.encode())
        elif name.endswith(".toml"):
            if tomllib:
                # The mark of UTF-8 before the text is no part of it.
                tomllib.loads(content.decode("utf-8-sig"))
        elif name.endswith(".csv"):
            check_table(content)
        elif name.endswith(".png"):
            check_png(content)
        elif name.endswith((".jpg", ".jpeg")) and not (content[:2] == b"\xff\xd8" and b"\xff\xd9" in content):
            raise ValueError("no beginning or no end of a JPEG")
        elif name.endswith(".webp") and struct.unpack_from("<4sI4s", content)[::2] != (b"RIFF", b"WEBP"):
            raise ValueError("no WebP")
        elif name.endswith((".txt", ".pts")):
            content.decode("utf-8")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError, struct.error,
            zlib.error, csv.Error) as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None
