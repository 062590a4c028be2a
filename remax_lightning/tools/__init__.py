"""Subcommands of `remax` beyond Lightning's own, one file each."""
