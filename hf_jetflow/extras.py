"""The guard for optional packages: one message that says what to install."""

from importlib.util import find_spec

from .errors import JetFlowError


EXTRAS = {"gguf": "train", "matplotlib": "bench"}


def require_package(package: str, purpose: str) -> None:
    """
    Check that an optional package is installed.

    Args:
        package: Its import name, which is also its name on PyPI.
        purpose: What needs it, as the subject of the message: "plots", "GGUF files".

    Raises:
        JetFlowError: Naming the package and the extra of hf_jetflow that installs it.
    """
    if find_spec(package) is None:
        extra = f"`pip install 'hf-jetflow[{EXTRAS[package]}]'` or " if package in EXTRAS else ""
        raise JetFlowError(f"{purpose} need {package}, which is not installed; run {extra}`pip install {package}`")
