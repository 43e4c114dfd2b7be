"""The versions of a framework that an adapter was written for and tested with."""

from importlib.metadata import PackageNotFoundError, version

from ..ops._check import fail


def check_version(package: str, known: tuple[str, ...]) -> None:
    """Raises ImportError where the package is not installed, RuntimeError for a version that is not known.

    known   the beginnings of versions: "0.9" stands for 0.9.1
    """
    try:
        found = version(package)
    except PackageNotFoundError as error:
        raise ImportError(f"{package} is not installed") from error
    if not any(found.split(".")[: len(one.split("."))] == one.split(".") for one in known):
        fail(package, f"be of version {' or '.join(known)}", found, RuntimeError)
