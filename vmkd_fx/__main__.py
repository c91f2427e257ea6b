"""`python -m vmkd_fx`: the command `vmkd`."""

from vmkd_fx.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
