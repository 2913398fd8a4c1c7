"""`python -m nsagen` is `nsagen`."""

from nsagen.cli.app import main

if __name__ == "__main__":
    main()
