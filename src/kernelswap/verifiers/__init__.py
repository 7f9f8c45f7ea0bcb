"""Plug point: one file per reason to trust a directory. Each has `check`, and `precheck` where it needs no bytes."""
