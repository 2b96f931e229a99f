"""The MPI transport where there is no MPI."""

import sys

import pytest
from moe_comm.errors import TransportError
from moe_comm.transport_mpi import MpiTransport


def test_without_mpi4py_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(TransportError, match=r"needs mpi4py .* pip install 'moe_runtime\[mpi\]'$"):
        MpiTransport()
