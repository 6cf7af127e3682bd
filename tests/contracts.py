"""How annotations of gudlib are enforced in the tests: see `conftest.py` in the project's root."""

from beartype import BeartypeConf, beartype

enforced = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
