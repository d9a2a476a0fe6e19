"""`python -m effc`."""

from effc.cli.main import main

if __name__ == "__main__":
    main()
