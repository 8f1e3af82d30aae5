"""Reads the conformance vectors with Python's own library: `python read_vectors.py FOLDER OPERATION < LINES`.

A line asks for a tensor, as `quantize_4bit/nf4-size-1 inputs x`. The answer is its dtype, its shape, its bytes in hexadecimal.
"""

import json
import sys
from pathlib import Path


# ten lines
def load(folder, operation):
    body = json.loads((folder / f"{operation}.json").read_text())
    data = (folder / body["tensors"]).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])

    def tensor(key):
        first, last = header[key]["data_offsets"]
        return header[key]["dtype"], header[key]["shape"], data[start + first : start + last]

    return {case["id"]: case for case in body["cases"]}, tensor


# end


def main():
    cases, tensor = load(Path(sys.argv[1]), sys.argv[2])
    for line in sys.stdin:
        case, part, name = line.split()
        found = cases[case][part][name]
        dtype, shape, data = tensor(found if part == "inputs" else found["value"])
        print(dtype, ",".join(map(str, shape)), data.hex())


if __name__ == "__main__":
    main()
