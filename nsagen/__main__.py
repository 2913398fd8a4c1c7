"""`python -m nsagen` is `nsagen`."""

from nsagen.cli import main

if __name__ == "__main__":
    main()
