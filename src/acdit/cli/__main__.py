"""python -m acdit.cli"""

import sys

from acdit.cli import main

sys.exit(main())
