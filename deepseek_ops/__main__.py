"""`python -m deepseek_ops`: the command line."""

from __future__ import annotations

import sys

from deepseek_ops.cli import main

if __name__ == "__main__":
    sys.exit(main())
