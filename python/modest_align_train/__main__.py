"""`python -m modest_align_train` is `modest-align`."""

import sys

from modest_align_train.cli import main

sys.exit(main())
