"""The command line. Start with `main.py`: one function per command, which imports what it runs."""
