"""`python -m experiments`: the paper in miniature. Read `miniature/__main__.py`."""

from experiments.miniature.__main__ import main

if __name__ == "__main__":
    main()
