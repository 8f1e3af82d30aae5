"""`python -m bnbref`."""

import sys

from bnbref.cli import main

sys.exit(main())
