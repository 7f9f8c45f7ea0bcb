"""Errors: three parts, whose fault, the types that others catch, and across the borders of processes."""

import copy
import inspect
import pickle

import pytest

from kernelswap import errors
from kernelswap.errors import KernelSwapError

EVERY = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, KernelSwapError)]


def made(cls):
    if cls is errors.SpecError:
        return cls("found", text="org/x@", span=(5, 6), todo="do this")
    return cls("found\nmore of it", asked="asked", todo="do this")


@pytest.mark.parametrize("cls", EVERY, ids=lambda c: c.__name__)
def test_an_error_crosses_the_border_of_a_process_whole(cls):
    error = made(cls)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is cls
        assert (str(other), other.args, vars(other)) == (str(error), error.args, vars(error))
        assert (other.reason, other.fault) == ("found", cls.fault)


@pytest.mark.parametrize("cls", EVERY, ids=lambda c: c.__name__)
def test_the_table_at_the_top_names_it_with_whose_fault_it_is(cls):
    line = next(line for line in errors.__doc__.splitlines() if line.strip(" -*").split(" ")[0] == cls.__name__)
    assert cls is KernelSwapError or line.endswith(f" {cls.fault}")


@pytest.mark.parametrize(
    ("cls", "caught"),
    [
        (errors.UnknownKernel, (ValueError, LookupError)),
        (errors.NotOnHub, (ValueError, OSError)),
        (errors.NoDirectory, (ValueError, FileNotFoundError)),
        (errors.NoVariant, (FileNotFoundError,)),
        (errors.Unsuited, (FileNotFoundError, RuntimeError)),
        (errors.NotCached, (FileNotFoundError,)),
        (errors.Unreachable, (ConnectionError, OSError)),
        (errors.MissingDependency, (ImportError,)),
        (errors.LoadFailed, (ImportError, RuntimeError)),
        (errors.DependencyError, (RuntimeError,)),
        (errors.BadMetadata, (ValueError,)),
        (errors.Refused, (ValueError,)),
        (errors.SpecError, (ValueError,)),
        (errors.ModeError, (ValueError,)),
        (errors.LayerMismatch, (TypeError,)),
    ],
    ids=lambda c: getattr(c, "__name__", ""),
)
def test_it_is_what_callers_of_other_loaders_catch(cls, caught):
    assert all(issubclass(cls, kind) for kind in caught)
