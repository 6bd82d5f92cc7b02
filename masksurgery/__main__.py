"""`python -m masksurgery`: the command line."""

from masksurgery.cli import main

if __name__ == "__main__":
    main()
