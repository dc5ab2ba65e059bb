"""The entry point of `hf-jetflow`: parses the arguments before `hf_jetflow` is imported, and torch with it.

Importing a module of a package runs the package's `__init__`, and ours imports torch and transformers to install the
dispatch. Help, version, refusals and light commands need neither, so the `__init__` runs after they are parsed, if at
all.
"""

import importlib.util
import sys


def main() -> None:
    """Parse the arguments, import the package, and run the command."""
    spec = importlib.util.find_spec("hf_jetflow")
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules["hf_jetflow"] = importlib.util.module_from_spec(spec)  # its `__init__` has not run
    from hf_jetflow.cli.main import parse, run

    command = parse()
    if not getattr(command.module, "IS_LIGHT", False):
        if sys.stderr.isatty() and not any(getattr(settings, "quiet", False) for settings in command.settings):
            sys.stderr.write("importing torch and transformers ...\n")
        spec.loader.exec_module(package)
    run(command)
