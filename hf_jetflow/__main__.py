"""`python -m hf_jetflow`, the same command line as `hf-jetflow`."""

from .cli.main import main


if __name__ == "__main__":
    main()
