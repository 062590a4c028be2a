"""Subcommands of `remax` that are not Lightning's; one module each."""
