"""The tests, and the kernels of the notebooks among them, run in the environment that a refresh runs in."""

import os

from gudlib.notebooks import ENVIRONMENT

os.environ.update(ENVIRONMENT)
