"""`python -m adaptrank`."""

from adaptrank.cli import main

if __name__ == "__main__":
    main()
