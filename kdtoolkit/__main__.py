"""`python -m kdtoolkit` is `kd`."""

from kdtoolkit.cli import main

if __name__ == "__main__":
    main()
