"""python -m hrm_model: the command `hrm`."""

import sys

from .cli import main

sys.exit(main())
