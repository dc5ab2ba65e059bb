"""The command line. Start with `main.py`, which parses the arguments and runs a command; each command is one module.

A command's module holds its help (the docstring), its settings (dataclasses that live with what they set), and `run`.
`parser.py` makes the options from the settings; `console.py` prints. Until `run`, nothing here imports torch;
a command with `IS_LIGHT` never does.
"""
