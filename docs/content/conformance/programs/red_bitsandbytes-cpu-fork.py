"""The fork has bitsandbytes' module, and what is red in it is in bitsandbytes' program: `pip install bitsandbytes-cpu-fork`."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("red_bitsandbytes.py")))
