"""`hf-jetflow` and `python -m hf_jetflow`: the command line, where the packages that it needs are installed."""


def main() -> None:
    """
    Run the command line.

    Raises:
        SystemExit: With what to install, where typer or rich are missing.
    """
    try:
        from .cli.main import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        raise SystemExit(
            f"error: the commands need {error.name}, which is not installed; run `pip install typer rich`, or "
            "`pip install -e '.[train]'` in a clone of hf_jetflow"
        ) from None
    run()


if __name__ == "__main__":
    main()
