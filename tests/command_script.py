"""The `remax` command as a file, which Lightning can start again for further devices."""

from __future__ import annotations

from remax_lightning.cli import main

if __name__ == "__main__":
    main()
