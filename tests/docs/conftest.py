"""What makes the pages of the site."""

import sys
from pathlib import Path

GENERATE = Path(__file__).resolve().parents[2] / "docs" / "generate"
sys.path.insert(0, str(GENERATE))
