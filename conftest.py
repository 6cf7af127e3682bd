"""The tests, and the kernels of the notebooks among them, run in the environment that a refresh runs in.

In the tests' own process every annotation of gudlib, shapes included, is enforced.
"""

import os
import sys
from pathlib import Path

from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent / "tests"))
install_import_hook("gudlib", "contracts.enforced")  # before anything of gudlib is imported

from gudlib.book.notebooks import ENVIRONMENT  # noqa: E402

os.environ.update(ENVIRONMENT)
