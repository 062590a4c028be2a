"""`python -m remax_lightning` is the command `remax`, for an interpreter whose scripts are not on the path."""

from remax_lightning.cli import main

if __name__ == "__main__":
    main()
