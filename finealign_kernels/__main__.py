"""`python -m finealign_kernels` is `finealign`."""

import sys

from .cli import main

sys.exit(main())
