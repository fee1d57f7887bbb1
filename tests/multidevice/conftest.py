"""The small models and loaders of tests/train serve here too."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent.with_name("train")))
