"""QLoRA in a program of one's own: what `python -m bnbref qlora` runs, as a function. Its source is the thing to copy and change.

    python docs/examples/qlora.py [STEPS] [FOLDER]

teaches bnbref's demo model, a writer of Python documentation, the source of `argparse`. Needs: pip install 'bnbref[hf]'.
"""

import argparse
import inspect
import sys
from pathlib import Path

from bnbref.demo import MODEL
from bnbref.integrations.qlora import qlora


def main(steps: str = "60", folder: str = "adapter") -> None:
    found = qlora(str(MODEL), inspect.getsource(argparse), Path(folder), steps=int(steps), batch=8, length=128, lr=2e-3)
    print(f"held-out perplexity {found.before:.2f} before, {found.after:.2f} after {len(found.losses)} steps")
    print(f"{found.parameters:,} parameters, {found.nbytes / 2**20:.1f} MiB in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
