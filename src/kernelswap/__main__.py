"""`python -m kernelswap`."""

from kernelswap.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
