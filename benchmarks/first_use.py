"""First use: seconds until the demo model stands in NF4 with double quantization, each in a fresh process.

    python benchmarks/first_use.py [--runs 3]

imports: torch and transformers. load: `from_pretrained` until it returns, bnbref's or bitsandbytes' import and every
compilation included. cold: Inductor's cache is empty; warm: the same process a second time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timing

MODEL = Path(__file__).parent.parent / "bnbref" / "demo" / "model"

PROGRAM = """
import json, sys, time
start = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
imported = time.perf_counter()
if sys.argv[1] == "bnbref":
    from bnbref import BnbRefConfig
    config = BnbRefConfig("nf4", double_quant=True)
else:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=config, dtype=torch.bfloat16)
loaded = time.perf_counter()
model(torch.ones(1, 64, dtype=torch.long))
forward = time.perf_counter()
print(json.dumps({"imports": imported - start, "load": loaded - imported, "first forward": forward - loaded}))
"""


def run(library: str, cache: str) -> dict[str, float]:
    """Seconds of each phase in a fresh process whose Inductor caches in `cache`."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, library, str(MODEL)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    phases: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    seconds: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as cache:
            seconds.setdefault("bnbref, cold", []).append(run("bnbref", cache))
            seconds.setdefault("bnbref, warm", []).append(run("bnbref", cache))
            seconds.setdefault("bitsandbytes", []).append(run("bitsandbytes", cache))
    rows: list[dict[str, Any]] = []
    print(f"{'seconds, medians':20s} {'imports':>9s} {'load':>9s} {'1st forward':>12s}")
    for what, runs in seconds.items():
        row: dict[str, Any] = {phase: statistics.median(r[phase] for r in runs) for phase in runs[0]}
        rows.append({"what": what, **row})
        print(f"{what:20s} {row['imports']:9.2f} {row['load']:9.2f} {row['first forward']:12.2f}")
    print("saved", timing.save("first_use", rows))


if __name__ == "__main__":
    main()
