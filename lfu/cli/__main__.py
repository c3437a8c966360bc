"""`python -m lfu.cli`."""

import sys

from lfu.cli import main

sys.exit(main())
